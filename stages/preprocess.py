"""Stage preprocess: decode and resize every image once, and pack them into arrays that training memory-maps.

Inputs   data/raw/; params `preprocess`
Outputs  data/processed/: {train,val}_images.npy, {train,val}_labels.npy, meta.json, files.json (stages/core/dataset.py)
Command  python -m stages.preprocess
"""

from __future__ import annotations

import hashlib
import tarfile
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from stages.core.dataset import PROCESSED, PackMeta
from stages.core.errors import InputError, run_main
from stages.core.image import CropMode, Interpolation, decode
from stages.core.labels import readable
from stages.core.output import replace_directory, write_json
from stages.core.parallel import parallel_map
from stages.core.params import Section, load_params
from stages.core.progress import progress, stage_summary
from stages.core.runtime import RuntimeParams, num_workers
from stages.core.source import RAW, SPLITS, load_source_info

_VALUES = np.arange(256, dtype=np.int64)


class PreprocessParams(Section):
    """The `preprocess` section of params.yaml."""

    image_size: Annotated[int, Field(ge=8, le=1024)]
    crop_mode: CropMode
    interpolation: Interpolation
    on_bad_image: Literal["stop", "skip"]


class Params(Section):
    """What this stage reads."""

    preprocess: PreprocessParams
    runtime: RuntimeParams


class _Packed(NamedTuple):
    """What became of one image: its sums for the statistics and its hash, or why it cannot be read."""

    row: int
    sums: NDArray[np.int64]  # (2, 3): per channel the sum of values and of squares; exact, so order cannot matter
    digest: bytes  # SHA-256 of the pixels
    error: str | None


def main(params: Params) -> None:
    """Write data/processed/ from data/raw/, or leave it as it was and raise InputError."""
    source = load_source_info()
    classes = source.classes
    with stage_summary("preprocess") as made, replace_directory(PROCESSED) as out:
        files: dict[str, list[str]] = {}
        skipped: dict[str, list[str]] = {}
        per_class: dict[str, list[int]] = {}
        train_sums = np.zeros((2, 3), dtype=np.int64)
        content = hashlib.sha256()
        for split in SPLITS:
            names, sums, skipped[split] = pack_split(split, out, params, content)
            labels = np.array([classes.index(name.split("/")[0]) for name in names], dtype=np.int64)
            counts = np.bincount(labels, minlength=len(classes))
            if not counts.all():
                raise InputError(f"{split}: no readable image of class {classes[int(counts.argmin())]!r} is left")
            np.save(out / f"{split}_labels.npy", labels)
            content.update(labels.astype("<i8").tobytes())
            files[split], per_class[split] = names, counts.tolist()
            if split == "train":
                train_sums = sums
        size = params.preprocess.image_size
        num_pixels = len(files["train"]) * size * size
        mean = train_sums[0] / num_pixels
        std = np.sqrt(np.maximum(train_sums[1] / num_pixels - mean**2, 1.0))  # a constant set must not divide by 0
        meta = PackMeta(
            classes=[readable(class_id) for class_id in classes],
            class_ids=classes,
            image_size=size,
            crop_mode=params.preprocess.crop_mode,
            interpolation=params.preprocess.interpolation,
            num_images={split: len(files[split]) for split in SPLITS},
            num_per_class=per_class,
            skipped=skipped,
            mean=[round(float(value) / 255, 6) for value in mean],
            std=[round(float(value) / 255, 6) for value in std],
            sha256=content.hexdigest(),
            source_sha256=source.sha256,
        )
        write_json(out / "meta.json", meta.model_dump())
        write_json(out / "files.json", files)
        num_skipped = sum(len(names) for names in skipped.values())
        made.append(f"{' + '.join(f'{len(files[split]):,} {split}' for split in SPLITS)} images at {size} px")
        made.append(f"{num_skipped} skipped, packed in {PROCESSED}")


def pack_split(
    split: str, out: Path, params: Params, content: hashlib._Hash
) -> tuple[list[str], NDArray[np.int64], list[str]]:
    """Pack one split's images and feed their hashes to `content`.

    Returns the names kept, their summed statistics and the names skipped.
    """
    tar_path = RAW / f"{split}.tar"
    try:
        with tarfile.open(tar_path, "r:") as tar:
            members = [(info.name, info.offset_data, info.size) for info in tar]
    except (FileNotFoundError, tarfile.TarError) as error:
        raise InputError(f"{tar_path}: {error}; run `dvc repro extract`") from None
    size = params.preprocess.image_size
    path = out / f"{split}_images.npy"
    shape = (len(members), size, size, 3)
    first_byte = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape).offset

    pack = partial(_pack_image, tar_path, split, path, first_byte, params.preprocess)
    items = [(row, *member) for row, member in enumerate(members)]
    results = parallel_map(pack, items, num_workers(params.runtime))
    sums = np.zeros((2, 3), dtype=np.int64)
    kept: list[int] = []
    bad: list[str] = []
    for packed in progress(results, f"preprocess {split}", len(items)):
        if packed.error is None:
            kept.append(packed.row)
            sums += packed.sums
            content.update(packed.digest)
        elif params.preprocess.on_bad_image == "stop":
            raise InputError(f"{packed.error}; mend or remove it, or set preprocess.on_bad_image to skip")
        else:
            bad.append(f"{split}/{members[packed.row][0]}")
    if bad:
        _keep_rows(path, kept)
    return [members[row][0] for row in kept], sums, bad


def _pack_image(
    tar_path: Path,
    split: str,
    array_path: Path,
    first_byte: int,
    params: PreprocessParams,
    item: tuple[int, str, int, int],
) -> _Packed:
    """Decode one member of the tar into its row of the array (runs in a worker process)."""
    row, name, offset, num_bytes = item
    with tar_path.open("rb") as file:
        file.seek(offset)
        content = file.read(num_bytes)
    try:
        pixels = decode(content, f"{split}/{name}", params.image_size, params.crop_mode, params.interpolation)
    except InputError as error:
        return _Packed(row, np.zeros((2, 3), dtype=np.int64), b"", str(error))
    with array_path.open("r+b", buffering=0) as array:  # mapping it anew for each image takes ten times as long
        array.seek(first_byte + row * pixels.nbytes)
        array.write(pixels.data)
    counts = np.array(Image.fromarray(pixels).histogram(), dtype=np.int64).reshape(3, 256)
    sums = np.stack([counts @ _VALUES, counts @ _VALUES**2])
    return _Packed(row, sums, hashlib.sha256(pixels.data).digest(), None)


def _keep_rows(path: Path, rows: list[int]) -> None:
    """Rewrite a packed array with only these rows, in bounded memory."""
    old = np.load(path, mmap_mode="r")
    shorter = path.with_name(f"{path.name}.kept")
    new = np.lib.format.open_memmap(shorter, mode="w+", dtype=np.uint8, shape=(len(rows), *old.shape[1:]))
    for start in range(0, len(rows), 256):
        new[start : start + 256] = old[rows[start : start + 256]]
    new.flush()
    shorter.replace(path)


if __name__ == "__main__":
    run_main(lambda: main(load_params(Params)), "preprocess")
