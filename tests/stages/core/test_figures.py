"""Pictures that Matplotlib must be able to draw."""

from __future__ import annotations

import warnings

import numpy as np

from stages.core import figures


def test_dollars_in_names_are_no_formula() -> None:
    names = ["$5_$10", "US$_{x$", "one $"]
    pictures = [
        figures.confusion_matrix(np.eye(3, dtype=np.int64), names),
        figures.mistakes(np.zeros((3, 8, 8, 3), dtype=np.uint8), names),
    ]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)


def test_names_are_cut_and_those_without_a_font_are_numbers() -> None:
    names = ["n02979186 cassette player", "fußball", "x" * 200, "\U0001fadc", "a" * 20]
    found = figures.labels(names)
    assert found == ["n02979186 …te player", "fußball", "xxxxxxxxxx…xxxxxxxxx", "class 3", "a" * 20]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a layout that has no room, of glyphs that are missing
        figures.confusion_matrix(np.eye(5, dtype=np.int64), names)
        figures.mistakes(np.zeros((5, 8, 8, 3), dtype=np.uint8), [f"{name}\nas {name} 100%" for name in found])
