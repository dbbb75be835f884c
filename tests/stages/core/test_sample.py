from __future__ import annotations

import io

import numpy as np
from PIL import Image

from stages.core import sample


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def test_an_image_depends_on_seed_split_and_index_alone() -> None:
    one = sample.render(0, 0, 7, size=32)
    assert one == sample.render(0, 0, 7, size=32)
    others = [sample.render(1, 0, 7, size=32), sample.render(0, 1, 7, size=32), sample.render(0, 0, 17, size=32)]
    assert one not in others


def test_sizes_and_classes() -> None:
    assert len(sample.CLASSES) == 10
    assert list(sample.CLASSES) == sorted(sample.CLASSES)
    for size in (16, 50, 64):
        assert pixels(sample.render(0, 0, 0, size=size)).shape == (size, size, 3)


def test_pixels_do_not_give_the_class_away() -> None:
    """The mean colour, fitted by least squares, must stay far below what a network that sees shapes reaches."""
    count = 400
    means = np.stack([pixels(sample.render(0, 0, i, size=16)).mean(axis=(0, 1)) for i in range(2 * count)])
    inputs = np.concatenate([means, means**2, np.ones((len(means), 1))], axis=1)
    labels = np.arange(2 * count) % 10
    weights = np.linalg.lstsq(inputs[:count], np.eye(10)[labels[:count]], rcond=None)[0]
    top1 = ((inputs[count:] @ weights).argmax(axis=1) == labels[count:]).mean()
    assert top1 < 0.5
