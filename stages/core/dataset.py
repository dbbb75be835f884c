"""The packed image set: arrays on disk that are memory-mapped, and the facts that travel with them.

data/processed/
    {train,val}_images.npy   uint8 (N, size, size, 3), RGB
    {train,val}_labels.npy   int64 (N,), index into the classes
    {train,val}_crc32.npy    uint32 (N,), CRC-32 of each image's pixels
    meta.json                PackMeta
    files.json               {"train": [...], "val": [...]}: name of each image in the source, in the arrays' order
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from stages.core.errors import InputError
from stages.core.output import check_unaltered
from stages.core.params import Section

PROCESSED = Path("data/processed")
_CHECKED_AT_ONCE = 256  # images


class PackMeta(Section):
    """meta.json of a packed set."""

    classes: list[str]  # readable names
    class_ids: list[str]  # folder names in the source
    image_size: int  # side in pixels
    crop_mode: str
    interpolation: str
    num_images: dict[str, int]  # by split
    num_per_class: dict[str, list[int]]  # by split, in the order of classes
    skipped: dict[str, list[str]]  # unreadable images left out, by split
    mean: list[float]  # per channel over train, pixel values scaled to [0, 1]
    std: list[float]
    sha256: str  # of the pixels and labels, in the arrays' order
    labels_sha256: dict[str, str]  # of the file, by split
    source_sha256: str


class Split(NamedTuple):
    """Images uint8 (N, H, W, 3), memory-mapped read-only, labels int64 (N,), and CRC-32 uint32 (N,) of each image."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    checksums: NDArray[np.uint32] | None = None  # None: nothing is checked


def load_meta(folder: Path = PROCESSED) -> PackMeta:
    """Read meta.json; InputError when it is missing or not what preprocess writes."""
    path = folder / "meta.json"
    try:
        return PackMeta.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: not found; run `dvc repro preprocess` (or `dvc checkout`)") from None
    except ValidationError as error:
        raise InputError(f"{path}: not written by this version; run `dvc repro preprocess`: {error}") from None


def load_file_names(split: str, folder: Path = PROCESSED) -> list[str]:
    """Name of each image of a split in the source, in the arrays' order."""
    path = folder / "files.json"
    try:
        names: list[str] = json.loads(path.read_bytes())[split]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: {error}; run `dvc repro preprocess` (or `dvc checkout`)") from None
    return names


def load_split(split: str, meta: PackMeta, folder: Path = PROCESSED) -> Split:
    """Map one split's arrays; InputError when they do not fit meta.json.

    Pixels are compared with their checksums by whoever reads them: `read_rows`, or `check_images` before.
    """
    images_path, labels_path = folder / f"{split}_images.npy", folder / f"{split}_labels.npy"
    checksums_path = folder / f"{split}_crc32.npy"
    try:
        images = np.load(images_path, mmap_mode="r")
        labels = np.load(labels_path)
        checksums = np.load(checksums_path)
    except (FileNotFoundError, ValueError, EOFError) as error:
        raise InputError(f"{folder}: {error}; run `dvc repro preprocess`") from None
    count, size = meta.num_images[split], meta.image_size
    if images.shape != (count, size, size, 3) or images.dtype != np.uint8:
        raise InputError(
            f"{images_path}: {images.dtype} {images.shape}, but meta.json says {count} images of {size} px"
        )
    is_whole = labels.dtype.kind in "iu" and labels.shape == (count,) and count > 0
    if not is_whole or labels.min() < 0 or labels.max() >= len(meta.classes):
        raise InputError(f"{labels_path}: labels must be {count} numbers from 0 to {len(meta.classes) - 1}")
    check_unaltered(labels_path, meta.labels_sha256[split], "preprocess")
    if checksums.shape != (count,) or checksums.dtype != np.uint32:
        raise InputError(
            f"{checksums_path}: {checksums.dtype} {checksums.shape}, not a uint32 of each of {count} images"
        )
    return Split(images, labels.astype(np.int64, copy=False), checksums)


def check_images(split: Split) -> None:
    """InputError that names the first image whose pixels are not what preprocess wrote."""
    for start in range(0, len(split.labels), _CHECKED_AT_ONCE):
        rows = np.arange(start, min(start + _CHECKED_AT_ONCE, len(split.labels)))
        read_rows(split, rows, np.empty((len(rows), *split.images.shape[1:]), dtype=np.uint8))


def read_rows(split: Split, indices: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
    """Copy images into `out` (len(indices), H, W, 3); InputError when one is not what preprocess wrote."""
    images = split.images
    if isinstance(images, np.memmap):
        _read_mapped(images, indices, out)
    else:
        np.take(images, indices, axis=0, out=out)
    if split.checksums is None:
        return
    for row, index, checksum in zip(out, indices.tolist(), split.checksums[indices].tolist(), strict=True):
        if zlib.crc32(row) != checksum:
            raise InputError(
                f"{getattr(images, 'filename', PROCESSED)}: image {index} altered since preprocess wrote it (by its "
                "CRC-32); `python -m tools.verify --repair` looks for an intact copy, and runs preprocess again where "
                "there is none"
            )


def _read_mapped(
    images: np.memmap[Any, np.dtype[np.uint8]], indices: NDArray[np.int64], out: NDArray[np.uint8]
) -> None:
    """Read rows of the mapped file, without the mapping.

    Pages that were looked at through it count as the process's resident memory, which would grow to the pack's size.
    """
    num_bytes = images[0].nbytes
    path = str(images.filename)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for row, index in zip(out, indices.tolist(), strict=True):
            if os.preadv(descriptor, [row.reshape(-1)], images.offset + index * num_bytes) != num_bytes:
                raise InputError(f"{path}: ends before image {index}; run `dvc repro preprocess`")
    finally:
        os.close(descriptor)
