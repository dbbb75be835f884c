"""Labelled drifted images, from a person or simulated, as the archive that `data.extra` takes.

The archive is named by its content. It holds what the present `data.extra` added, too: what a model learned at an
earlier drift is not given up at the next.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.core.archive import Limits, open_labelled
from stages.core.corruptions import corrupt
from stages.core.dataset import check_images, load_file_names, load_meta, load_split
from stages.core.download import file_hash
from stages.core.errors import InputError
from stages.core.image import check_is_image
from stages.core.keyed import uniforms
from stages.core.source import EXTRA_PREFIX, RAW, SPLITS, check_content, is_extra, load_source_info

_SIMULATION_SEED = {"train": 1, "val": 2}  # what is held out gets other noise than what is trained on


class LabelledImage(NamedTuple):
    """An encoded image to be added."""

    split: str  # train, or val: held out
    class_name: str
    file_name: str
    read: Callable[[], bytes]
    key: str = ""  # 8 hex digits that keep its name apart in the archive: of its content, or of how it was simulated
    digest: str = ""  # SHA-256 of its content, 64 hex digits; of a simulated image it is not known


@dataclass(frozen=True)
class LabelledSet:
    """Images of one origin."""

    origin: str  # what the user named
    key: str  # 8 hex digits of all its content
    images: list[LabelledImage]

    def count(self, split: str) -> int:
        """Images of a split."""
        return sum(image.split == split for image in self.images)


@dataclass(frozen=True)
class Archive:
    """The file that `data.extra` names."""

    path: Path
    sha256: str


@contextmanager
def open_folder(
    path: Path,
    limits: Limits,
    scratch: Path,
    classes: list[str],
    held_out: float,
    present: Sequence[LabelledImage] = (),
) -> Iterator[LabelledSet]:
    """Labelled images of a folder or archive: `train/<class>/*`, `val/<class>/*` as they are, `<class>/*` split here.

    Which side an image is on depends on its content only, so that copies are on the same; one that is `present` from
    an earlier retraining stays on its side. Raises InputError for what `data.extra` refuses, when a side has no image,
    and when one is held out that is trained on.
    """
    # What is on both sides, as retrainings of before could have it, was trained on.
    earlier = {image.digest: image.split for image in sorted(present, key=lambda image: image.split == "train")}
    if not path.exists():
        raise InputError(f"--labels: {path}: no such file or folder")
    with open_labelled(path, limits, scratch, classes) as files:
        images: list[LabelledImage] = []
        digest = hashlib.sha256()
        for given, file in ((given, file) for given, some in files.items() for file in some):
            name, content = f"{file.class_name}/{file.file_name}", file.member.read()
            check_is_image(content, f"{path}: {name if given == 'all' else f'{given}/{name}'}")
            own = hashlib.sha256(content)
            side = earlier.get(own.hexdigest()) or _side(own.hexdigest(), held_out)
            split = side if given == "all" else given
            key = own.hexdigest()[:8]
            images.append(LabelledImage(split, *file[:2], file.member.read, key, own.hexdigest()))
            digest.update(f"{split}/{name}\0".encode() + own.digest())
        labelled = LabelledSet(str(path), digest.hexdigest()[:8], images)
        for split, purpose in zip(SPLITS, ("train on", "hold out"), strict=True):
            if not labelled.count(split):
                raise InputError(f"--labels: {path}: {len(images)} labelled images, none of them to {purpose}")
        trained_on = {image.digest for image in (*images, *present) if image.split == "train"}
        for image in images:
            if image.split == "val" and image.digest in trained_on:
                name = f"val/{image.class_name}/{image.file_name}"
                raise InputError(
                    f"--labels: {path}: {name} is to be held out, and is trained on, too, here or by an earlier "
                    "retraining: what is held out must be new to the model; keep each image on one side"
                )
        yield labelled


def simulate(kind: str, severity: int, share: float) -> LabelledSet:
    """The packed training images (`share` of them) and validation images, corrupted; those of `data.extra` left out."""
    meta = load_meta()
    images: list[LabelledImage] = []
    for split in SPLITS:
        packed = load_split(split, meta)
        check_images(packed)
        assert packed.checksums is not None
        rows: NDArray[np.int64] = np.flatnonzero([not is_extra(name) for name in load_file_names(split)])
        if split == "train" and share < 1:
            rows = rows[uniforms(0, 0, rows, 1)[:, 0] < share]
        images += [
            LabelledImage(
                split,
                meta.class_ids[packed.labels[i]],
                f"{i:07d}.png",
                _corrupted(packed.images, i, split, kind, severity),
                _short_hash(f"{kind} {severity} {packed.checksums[i]}"),  # the same at another simulation of the kind
            )
            for i in rows.tolist()
        ]
    names = [f"{image.split}/{image.class_name}/{image.key}-{image.file_name}" for image in images]
    labelled = LabelledSet(f"{kind}:{severity}", _short_hash(f"{kind} {severity} {' '.join(names)}"), images)
    if not labelled.count("train"):
        raise InputError(f"params.yaml: retrain.simulated_share: {share} leaves no training image")
    return labelled


def _corrupted(pixels: NDArray[np.uint8], row: int, split: str, kind: str, severity: int) -> Callable[[], bytes]:
    def read() -> bytes:
        batch = corrupt(pixels[row : row + 1], kind, severity, np.array([row]), _SIMULATION_SEED[split])
        buffer = io.BytesIO()
        Image.fromarray(batch[0]).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    return read


def current_extra() -> list[LabelledImage]:
    """What `data.extra` added to data/raw; InputError where that is not what extract wrote."""
    check_content(load_source_info())
    images: list[LabelledImage] = []
    for split in SPLITS:
        path = RAW / f"{split}.tar"
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if is_extra(info.name):
                    class_name, name = info.name.split("/")
                    read = _range_reader(path, info.offset_data, info.size)
                    digest = hashlib.sha256(read()).hexdigest()
                    name = name.removeprefix(EXTRA_PREFIX)
                    images.append(LabelledImage(split, class_name, name, read, digest=digest))
    return images


def write_archive(labelled: LabelledSet, present: list[LabelledImage], folder: Path) -> Archive:
    """Write `folder/labelled-<hash>.tar`, whole or not at all; the same images give the same bytes and name.

    An image that an earlier retraining has added already is in it once, with the label that it has now.
    """
    known = {image.digest for image in labelled.images}
    present = [image for image in present if image.digest not in known]
    new = [image._replace(file_name=f"{image.key}-{image.file_name}") for image in labelled.images]
    by_name = {image[:3]: image for image in [*present, *new]}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".labelled.tar.new"
    try:
        with temporary.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for name, image in sorted(by_name.items()):
                    content = image.read()
                    info = tarfile.TarInfo("/".join(name))
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                    tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every member otherwise
            file.flush()
            os.fsync(file.fileno())
        sha256 = file_hash(temporary, "sha256")
        path = folder / f"labelled-{sha256[:16]}.tar"
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return Archive(path, sha256)


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _side(digest: str, held_out: float) -> str:
    return "val" if int(digest[:8], 16) < held_out * 2**32 else "train"


def _range_reader(path: Path, offset: int, size: int) -> Callable[[], bytes]:
    def read() -> bytes:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    return read
