"""Map a function over many items with worker processes or threads, in order and in bounded memory."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import TypeVar

from stages.core.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")


def parallel_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, chunk: int = 32
) -> Iterator[Result]:
    """Yield function(item) in the order of `items`; at most a few chunks a worker are in flight.

    With `workers` 0 the calling process does the work, and where there is only one chunk. `function` must be
    picklable. Processes are spawned, not forked: a fork of a process that has threads can hang.
    """
    remaining = iter(items)
    chunks = iter(lambda: list(islice(remaining, chunk)), [])
    first = next(chunks, [])
    if workers == 0 or len(first) < chunk:
        yield from map(function, chain(first, remaining))
        return
    context = multiprocessing.get_context("spawn")
    waiting: deque[Future[list[Result]]] = deque()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            for some in chain([first], chunks):
                waiting.append(pool.submit(_apply, function, some))
                if len(waiting) > 3 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool:
            raise InputError(
                "a worker process was killed, most likely because memory ran out: lower runtime.workers"
            ) from None
        finally:
            # Not future.cancel(): before Python 3.11.4 the pool can then wait for ever (python/cpython#94440).
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """A worker waits for work on a pipe that it holds open itself: of a parent that was killed it would never hear."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _apply(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    return [function(item) for item in items]


def read_ahead(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Yield function(item) in the order of `items`, computed by threads that are at most two items each ahead.

    For work that releases the interpreter lock, such as reading. With `threads` 0 the caller does the work.
    """
    if threads == 0:
        yield from map(function, items)
        return
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
