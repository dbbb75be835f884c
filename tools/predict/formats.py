"""How predictions are written: CSV, JSON or a table, as text that can be printed while more are made."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from stages.core.production import printable


class Guess(NamedTuple):
    """A class, and how probable the model takes it to be."""

    name: str
    probability: float


class Prediction(NamedTuple):
    """What the model says of an image; the most probable class comes first."""

    path: str
    guesses: list[Guess]


def as_csv(predictions: Iterable[Prediction]) -> Iterator[str]:
    """Columns path, class, probability; a line for each guess."""
    yield _csv_line(["path", "class", "probability"])
    for path, guesses in predictions:
        for guess in guesses:
            yield _csv_line([path, guess.name, f"{guess.probability:.6f}"])


def as_json(predictions: Iterable[Prediction]) -> Iterator[str]:
    """A list of objects with path, class, probability; with several guesses an image also `top`, all of them."""
    yield "["
    separator = "\n  "
    for path, guesses in predictions:
        said = [{"class": guess.name, "probability": round(guess.probability, 6)} for guess in guesses]
        row: dict[str, Any] = {"path": path, **said[0]} | ({"top": said} if len(said) > 1 else {})
        yield separator + json.dumps(row, ensure_ascii=False)
        separator = ",\n  "
    yield "\n]\n"


def as_table(predictions: Iterable[Prediction]) -> Iterator[str]:
    """Aligned columns for a reader, when all predictions are made."""
    rows = [("path", "class", "probability")]
    for path, guesses in predictions:
        rows += [
            (printable(path) if first else "", guess.name, f"{guess.probability:.3f}")
            for first, guess in _firsts(guesses)
        ]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for path, name, probability in rows:
        yield f"{path:{widths[0]}}  {name:{widths[1]}}  {probability:>11}\n"


FORMATS: dict[str, Callable[[Iterable[Prediction]], Iterator[str]]] = {
    "csv": as_csv,
    "json": as_json,
    "table": as_table,
}


def _firsts(guesses: list[Guess]) -> Iterator[tuple[bool, Guess]]:
    for number, guess in enumerate(guesses):
        yield number == 0, guess


def _csv_line(cells: list[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()
