"""Pack images: decode and resize every image of some tars into one array a split, with worker processes."""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.core.errors import InputError
from stages.core.image import CropMode, Interpolation, decode
from stages.core.parallel import parallel_map
from stages.core.progress import progress

_CHUNK = 64  # images that a worker decodes, writes and reports at once


class Geometry(NamedTuple):
    """How an image becomes a square of pixels."""

    size: int  # side in pixels
    crop_mode: CropMode
    interpolation: Interpolation


class PackedSplit(NamedTuple):
    """What became of the images of a split, in the tar's order."""

    names: list[str]  # of the images in the array
    skipped: list[str]  # of those that cannot be decoded
    sums: NDArray[np.int64]  # (2, 3): per channel the sum of values and of squares; exact, so order cannot matter
    checksums: NDArray[np.uint32]  # CRC-32 of the pixels of each image in the array
    sha256: str  # of the encoded images and of the checksums


class _Member(NamedTuple):
    name: str
    offset: int
    num_bytes: int


class _Job(NamedTuple):
    """Some images that lie together, and where their pixels go."""

    split: str
    tar: Path
    array: Path
    first_byte: int
    members: Sequence[_Member]


class _Done(NamedTuple):
    split: str
    names: list[str]
    errors: list[str | None]  # of each image
    checksums: list[int]  # of each image, 0 where there is an error
    sums: NDArray[np.int64]
    digest: bytes


def pack(
    tars: dict[str, Path], counts: dict[str, int], out: Path, geometry: Geometry, skip_bad: bool, workers: int
) -> dict[str, PackedSplit]:
    """Write `out/SPLIT_images.npy`, uint8 (counts[SPLIT], size, size, 3), of each split's tar.

    An image that cannot be decoded raises InputError, or is left out with `skip_bad`.
    """
    names: dict[str, list[str]] = {split: [] for split in tars}
    errors: dict[str, list[str | None]] = {split: [] for split in tars}
    checksums: dict[str, list[int]] = {split: [] for split in tars}
    sums = {split: np.zeros((2, 3), dtype=np.int64) for split in tars}
    digests = {split: hashlib.sha256() for split in tars}
    # The tars are listed while the workers are busy already.
    jobs = (job for split, tar in tars.items() for job in _jobs(split, tar, counts[split], out, geometry.size))
    results = parallel_map(partial(_pack_some, geometry), jobs, workers, chunk=1)
    num_jobs = sum(-(-count // _CHUNK) for count in counts.values())
    for done in progress(results, "preprocess", num_jobs, scale=_CHUNK):
        first_error = next((error for error in done.errors if error is not None), None)
        if first_error is not None and not skip_bad:
            raise InputError(f"{first_error}; mend or remove it, or set preprocess.on_bad_image to skip")
        names[done.split] += done.names
        errors[done.split] += done.errors
        checksums[done.split] += done.checksums
        sums[done.split] += done.sums
        digests[done.split].update(done.digest)
    result = {}
    for split in tars:
        if len(names[split]) != counts[split]:
            raise InputError(f"{tars[split]}: {len(names[split])} images, not {counts[split]}; run `dvc repro extract`")
        kept = [row for row, error in enumerate(errors[split]) if error is None]
        bad = [f"{split}/{names[split][row]}" for row, error in enumerate(errors[split]) if error is not None]
        if bad:
            _keep_rows(_array_path(out, split), kept)
        result[split] = PackedSplit(
            [names[split][row] for row in kept],
            bad,
            sums[split],
            np.array(checksums[split], dtype=np.uint32)[kept],
            digests[split].hexdigest(),
        )
    return result


def _jobs(split: str, tar_path: Path, count: int, out: Path, size: int) -> Iterator[_Job]:
    """Make room for a split's pixels, and share its images out."""
    path = _array_path(out, split)
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, size, size, 3))
    try:
        with tarfile.open(tar_path, "r:") as tar:
            members = (_Member(info.name, info.offset_data, info.size) for info in tar)
            for row in range(0, count, _CHUNK):
                some = list(islice(members, _CHUNK))
                yield _Job(split, tar_path, path, array.offset + row * size * size * 3, some)
    except (FileNotFoundError, tarfile.TarError) as error:
        raise InputError(f"{tar_path}: {error}; run `dvc repro extract`") from None


def _array_path(out: Path, split: str) -> Path:
    return out / f"{split}_images.npy"


def _pack_some(geometry: Geometry, job: _Job) -> _Done:
    """Decode some images into their rows of the array (runs in a worker process)."""
    errors: list[str | None] = []
    checksums: list[int] = []
    sums = np.zeros((2, 3), dtype=np.int64)
    digest = hashlib.sha256()
    # Written, not mapped: mapped pages would count as this process's memory.
    with job.tar.open("rb") as file, job.array.open("r+b", buffering=0) as array:
        for row, (name, offset, num_bytes) in enumerate(job.members):
            file.seek(offset)
            content = file.read(num_bytes)
            try:
                pixels = decode(content, f"{job.split}/{name}", *geometry)
            except InputError as error:
                errors.append(str(error))
                checksums.append(0)
                continue
            errors.append(None)
            array.seek(job.first_byte + row * pixels.nbytes)
            array.write(pixels.data)
            sums += _sums(pixels)
            checksums.append(zlib.crc32(pixels.data))
            digest.update(content)
            digest.update(checksums[-1].to_bytes(4, "little"))
    names = [member.name for member in job.members]
    return _Done(job.split, names, errors, checksums, sums, digest.digest())


def _sums(pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Sums of values and of squares (2, 3) per channel of an image (H, W, 3); exact up to 66,051 rows."""
    rows = pixels.reshape(len(pixels), -1)
    columns = [rows.sum(axis=0, dtype=np.uint32), np.square(rows, dtype=np.uint16).sum(axis=0, dtype=np.uint32)]
    sums: NDArray[np.int64] = np.stack(columns).reshape(2, -1, 3).sum(axis=1, dtype=np.int64)
    return sums


def _keep_rows(path: Path, rows: list[int]) -> None:
    """Rewrite a packed array with only these rows, in bounded memory."""
    old = np.load(path, mmap_mode="r")
    shorter = path.with_name(f"{path.name}.kept")
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(rows), *old.shape[1:])}
    with shorter.open("wb") as file:  # written, not mapped: on a full disk, a mapped page kills the process
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(rows), 256):
            file.write(np.ascontiguousarray(old[rows[start : start + 256]]).data)
    shorter.replace(path)
