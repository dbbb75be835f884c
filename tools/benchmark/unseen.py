"""Images for production and for labels that no model has seen: new ones of the sample, or held back from a data set."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, groupby
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stages.core.archive import Limits, open_image_set
from stages.core.errors import InputError
from stages.core.image import decode
from stages.core.packing import Geometry
from tools.retrain.rehearsal import NewImages, NewSampleImages


class UnseenImages(NewImages, Protocol):
    """Where the images of a scenario come from; another `seed` gives others."""

    def production(self, seed: int) -> Iterator[int]:
        """Indices of images for production, the classes in turn."""
        ...

    def labelled(self, seed: int) -> Iterator[int]:
        """Indices of other images, to be labelled, the classes in turn."""
        ...


class UnseenOfSample(NewSampleImages):
    """The generator never ends."""

    def production(self, seed: int) -> Iterator[int]:
        """Indices of images for production, the classes in turn."""
        return count(10_000 * (seed + 1))

    def labelled(self, seed: int) -> Iterator[int]:
        """Indices of other images, to be labelled, the classes in turn."""
        return count(10_000 * (seed + 1) + 5000)


class UnseenOfArchive:
    """Training images that were held back: of each class, the first `num_production` are for production."""

    def __init__(self, held_back: Mapping[str, Sequence[bytes]], num_production: int, geometry: Geometry) -> None:
        """What `hold_back` gives; the geometry that preprocess packs with."""
        self.classes: Sequence[str] = sorted(held_back)
        self._images = held_back
        self._num_production = num_production
        self._geometry = geometry

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """Pixels as preprocess packs them, uint8 (size, size, 3)."""
        number, label = divmod(index, len(self.classes))
        name = self.classes[label]
        return decode(self._images[name][number], f"{name}, number {number}", *self._geometry)

    def production(self, seed: int) -> Iterator[int]:
        """Indices of images for production, the classes in turn; some come again where another seed began."""
        for number in range(self._num_production):
            row = (number + 17 * seed) % self._num_production
            yield from range(row * len(self.classes), (row + 1) * len(self.classes))

    def labelled(self, seed: int) -> Iterator[int]:
        """Indices of other images, to be labelled, the classes in turn; the same for all seeds."""
        first = self._num_production * len(self.classes)
        yield from range(first, len(self.classes) * len(self._images[self.classes[0]]))


def hold_back(
    source: Path, rest: Path, num_production: int, num_labelled: int, limits: Limits, scratch: Path
) -> dict[str, list[bytes]]:
    """Take training images at random, `num_production` of each class and `num_labelled` of all; the rest into a tar.

    Returns the encoded images by class, as many of each. InputError where a class has no more than these.
    """
    held_back: dict[str, list[bytes]] = {}
    with open_image_set(source, limits, scratch) as splits, tarfile.open(rest, "w") as tar:
        num_classes = len({file.class_name for file in splits["train"]})
        per_class = num_production + -(-num_labelled // num_classes)
        for split, files in splits.items():
            for class_name, group in groupby(files, key=lambda file: file.class_name):
                images = list(group)
                taken: set[int] = set()
                if split == "train":
                    if len(images) <= per_class:
                        raise InputError(
                            f"{source}: {len(images):,} training images of {class_name}, and {per_class:,} of each "
                            "class are held back; give smaller numbers for --production and --labelled"
                        )
                    order = np.random.default_rng(0).permutation(len(images))[:per_class].tolist()
                    taken = set(order)
                    held_back[class_name] = [images[row].member.read() for row in order]
                for row, file in enumerate(images):
                    if row not in taken:
                        _add(tar, f"{split}/{class_name}/{file.file_name}", file.member.read())
    return held_back


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
