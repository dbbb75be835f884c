"""Stage preprocess: decode and resize every image once, and pack them into arrays that training memory-maps.

Inputs   data/raw/; params `preprocess`
Outputs  data/processed/: {train,val}_images.npy, {train,val}_labels.npy, {train,val}_crc32.npy, meta.json,
         files.json (stages/core/dataset.py)
Command  python -m stages.preprocess
"""

from __future__ import annotations

import hashlib
import sys
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from stages.core.dataset import PROCESSED, PackMeta
from stages.core.errors import InputError
from stages.core.image import CropMode, Interpolation
from stages.core.labels import readable
from stages.core.output import replace_directory, sha256_of, write_json
from stages.core.packing import Geometry, pack
from stages.core.params import Section, load_params
from stages.core.progress import stage_summary
from stages.core.runtime import RuntimeParams, num_workers
from stages.core.source import RAW, SPLITS, check_content, load_source_info
from stages.core.stopping import run_stage

_NEARLY_BLACK = 1 / 16  # of white: a mean that no image of 12 bits exceeds which is read as one of 16


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


def main(params: Params) -> None:
    """Write data/processed/ from data/raw/, or leave it as it was and raise InputError."""
    source = load_source_info()
    check_content(source)
    classes = source.classes
    with stage_summary("preprocess") as made, replace_directory(PROCESSED) as out:
        knobs = params.preprocess
        packed = pack(
            {split: RAW / f"{split}.tar" for split in SPLITS},
            source.num_images,
            out,
            Geometry(knobs.image_size, knobs.crop_mode, knobs.interpolation),
            skip_bad=knobs.on_bad_image == "skip",
            workers=num_workers(params.runtime),
        )
        files = {split: packed[split].names for split in SPLITS}
        per_class: dict[str, list[int]] = {}
        content = hashlib.sha256()
        for split in SPLITS:
            labels = np.array([classes.index(name.split("/")[0]) for name in files[split]], dtype=np.int64)
            counts = np.bincount(labels, minlength=len(classes))
            if not counts.all():
                raise InputError(f"{split}: no readable image of class {classes[int(counts.argmin())]!r} is left")
            np.save(out / f"{split}_labels.npy", labels)
            np.save(out / f"{split}_crc32.npy", packed[split].checksums)
            content.update(packed[split].sha256.encode() + labels.astype("<i8").tobytes())
            per_class[split] = counts.tolist()
        num_pixels = len(files["train"]) * knobs.image_size**2
        mean, squares = packed["train"].sums / num_pixels
        std = np.sqrt(np.maximum(squares - mean**2, 1.0))  # a constant set must not divide by 0
        meta = PackMeta(
            classes=[readable(class_id) for class_id in classes],
            class_ids=classes,
            image_size=knobs.image_size,
            crop_mode=knobs.crop_mode,
            interpolation=knobs.interpolation,
            num_images={split: len(files[split]) for split in SPLITS},
            num_per_class=per_class,
            skipped={split: packed[split].skipped for split in SPLITS},
            mean=[round(float(value) / 255, 6) for value in mean],
            std=[round(float(value) / 255, 6) for value in std],
            sha256=content.hexdigest(),
            labels_sha256={split: sha256_of(out / f"{split}_labels.npy") for split in SPLITS},
            source_sha256=source.sha256,
        )
        write_json(out / "meta.json", meta.model_dump())
        write_json(out / "files.json", files)
        if max(meta.mean) < _NEARLY_BLACK:
            print(
                f"preprocess: data/raw: the training images are nearly black (at most {max(meta.mean):.3f} of white on "
                "average). Are they of 10 or 12 bits in files of 16? Then scale them to 16 bits",
                file=sys.stderr,
            )
        num_skipped = sum(len(packed[split].skipped) for split in SPLITS)
        made.append(
            f"{' + '.join(f'{len(files[split]):,} {split}' for split in SPLITS)} images at {knobs.image_size} px"
        )
        made.append(f"{num_skipped} skipped, packed in {PROCESSED}")


if __name__ == "__main__":
    run_stage(lambda: main(load_params(Params)), "preprocess")
