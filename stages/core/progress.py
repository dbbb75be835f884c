"""What a stage says while it works: a bar on a terminal, now and then a line elsewhere; and one line at its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


_SECONDS_BETWEEN_LINES = 30.0


def progress(
    items: Iterable[Item], what: str, total: int | None = None, unit: str = "img", scale: int = 1
) -> Iterator[Item]:
    """Pass `items` through, with rate and time left: as a bar on a terminal, elsewhere as a line every half minute.

    An item counts as `scale` units.
    """
    if sys.stderr.isatty():
        yield from tqdm(items, what, total, unit=unit, unit_scale=scale, leave=False, dynamic_ncols=True)
        return
    start = said = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - said >= _SECONDS_BETWEEN_LINES:
            said = now
            rate = number / (now - start)
            left = "" if total is None else f" of {scale * total:,}"
            wait = "" if total is None else f", {(total - number) / rate:,.0f} s left"
            line = f"{what}: {scale * number:,}{left}, {scale * rate:,.1f} {unit}/s{wait}"
            print(line, file=sys.stderr, flush=True)


@contextmanager
def stage_summary(name: str) -> Iterator[list[str]]:
    """Yield a list for what the stage made; print it in one line with the time that it took (seconds)."""
    start = time.perf_counter()
    made: list[str] = []
    yield made
    print(f"{name}: {', '.join(made)} ({time.perf_counter() - start:.1f} s)", flush=True)
