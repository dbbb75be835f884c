from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from stages.core.errors import InputError
from stages.core.parallel import parallel_map


def square(value: int) -> int:
    return value * value


def fail_at_50(value: int) -> int:
    if value == 50:
        raise InputError("item 50 is bad")
    return value


def kill_at_50(value: int) -> int:
    if value == 50:
        os.kill(os.getpid(), signal.SIGKILL)
    return value


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_results_come_in_order(workers: int) -> None:
    assert list(parallel_map(square, range(100), workers, chunk=8)) == [i * i for i in range(100)]


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_come_through(workers: int) -> None:
    with pytest.raises(InputError, match="item 50 is bad"):
        list(parallel_map(fail_at_50, range(100), workers, chunk=8))


def test_a_killed_worker_is_told() -> None:
    with pytest.raises(InputError, match=r"a worker process was killed.*runtime\.workers"):
        list(parallel_map(kill_at_50, range(100), 2, chunk=8))


def test_a_consumer_that_stops_early_is_no_problem() -> None:
    results: Iterator[int] = parallel_map(square, range(10_000), 1, chunk=8)
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
