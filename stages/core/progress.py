"""What a stage says while it works: a bar on a terminal, and one line at its end everywhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(items: Iterable[Item], what: str, total: int | None = None, unit: str = "img") -> Iterator[Item]:
    """Pass `items` through, with rate and time left on a terminal and nothing elsewhere."""
    yield from tqdm(items, desc=what, total=total, unit=unit, disable=None, leave=False, dynamic_ncols=True)


@contextmanager
def stage_summary(name: str) -> Iterator[list[str]]:
    """Yield a list for what the stage made; print it in one line with the time that it took (seconds)."""
    start = time.perf_counter()
    made: list[str] = []
    yield made
    print(f"{name}: {', '.join(made)} ({time.perf_counter() - start:.1f} s)", flush=True)
