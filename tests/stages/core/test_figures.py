"""Pictures that Matplotlib must be able to draw."""

from __future__ import annotations

import numpy as np

from stages.core import figures


def test_dollars_in_names_are_no_formula() -> None:
    names = ["$5_$10", "US$_{x$", "one $"]
    pictures = [
        figures.confusion_matrix(np.eye(3, dtype=np.int64), names),
        figures.mistakes(np.zeros((3, 8, 8, 3), dtype=np.uint8), names),
    ]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
