"""Pictures that Matplotlib must be able to draw."""

from __future__ import annotations

import warnings

import numpy as np
from matplotlib import font_manager

from stages.core import figures


def test_dollars_in_names_are_no_formula() -> None:
    names = ["$5_$10", "US$_{x$", "one $"]
    pictures = [
        figures.confusion_matrix(np.eye(3, dtype=np.int64), names),
        figures.mistakes(np.zeros((3, 8, 8, 3), dtype=np.uint8), names),
    ]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)


def test_names_are_cut_and_those_without_a_font_are_numbers() -> None:
    cars = [f"Chevrolet Silverado 1500 {kind} Cab 2012" for kind in ("Extended", "Regular")]
    names = ["n02979186 cassette player", "fußball", "x" * 200, "\U0001fadc", "a" * 20, "عربي", *cars]
    found = figures.labels(names)
    assert found[:5] == ["n02979186 …te player", "fußball", "xxxxxxxxxx…xxxxxxxxx", "class 3", "a" * 20]
    assert found[5:] == ["عربي", "6: Chevrolet Silver…", "7: Chevrolet Silver…"], "which the regular face has"
    assert figures._fonts()[0] == font_manager.findfont("DejaVu Sans")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a layout that has no room, of glyphs that are missing
        figures.confusion_matrix(np.eye(8, dtype=np.int64), names)
        figures.mistakes(np.zeros((8, 8, 8, 3), dtype=np.uint8), [f"{name}\nas {name} 100%" for name in found])
