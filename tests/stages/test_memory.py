"""Resident memory stays flat when the images are many: they stream, whatever the machine's memory is."""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from stages.core.output import sha256_of
from tests.helpers import ROOT, run, set_params

pytestmark = pytest.mark.slow

LIMIT = 256e6  # bytes that a large set may take more than a small one
SIDE = 160  # pixels

# The peak resident set of this process and of its largest worker, in bytes (VmHWM of proc(5)).
MEASURED = """if True:
    import resource
    from stages import {stage}
    from stages.core.params import load_params
    {stage}.main(load_params({stage}.Params))
    peaks = [resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print("peak", *peaks)
"""


def peaks(stage: str, folder: Path) -> list[int]:
    output = run(
        folder, sys.executable, "-c", MEASURED.format(stage=stage), environment={"PYTHONPATH": str(ROOT)}
    ).stdout
    return [int(value) for value in output.strip().splitlines()[-1].split()[1:]]


def enlarge(folder: Path, num_bytes: float) -> int:
    """Make the train split as large as that: a sparse file, which reads as black images but takes no disk."""
    count = int(num_bytes) // (SIDE * SIDE * 3)
    shape = (count, SIDE, SIDE, 3)
    path = folder / "data/processed/train_images.npy"
    path.unlink()
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape).flush()
    labels = folder / "data/processed/train_labels.npy"
    np.save(labels, np.arange(count, dtype=np.int64) % 10)
    np.save(
        folder / "data/processed/train_crc32.npy", np.full(count, zlib.crc32(bytes(SIDE * SIDE * 3)), dtype=np.uint32)
    )
    meta_path = folder / "data/processed/meta.json"
    meta = json.loads(meta_path.read_text())
    meta["num_images"]["train"] = count
    meta["labels_sha256"]["train"] = sha256_of(labels)
    meta_path.write_text(json.dumps(meta))
    return path.stat().st_size


@pytest.mark.parametrize("workers", [0, 2])
def test_training_on_a_pack_larger_than_the_limit(workers: int, packed: Path) -> None:
    settings = {
        "train.epochs": 1,
        "train.warmup_epochs": 0.0,
        "train.image_size": 16,
        "train.batch_size": 60,
        "train.crop_scale": [0.1, 0.2],
    }
    set_params(packed / "params.yaml", settings | {"preprocess.image_size": SIDE, "runtime.workers": workers})
    run(packed, sys.executable, "-m", "stages.preprocess", environment={"PYTHONPATH": str(ROOT)})
    enlarge(packed, LIMIT)
    small, _ = peaks("train", packed)
    assert enlarge(packed, 4 * LIMIT) > 3.9 * LIMIT
    large, _ = peaks("train", packed)
    assert large - small < LIMIT / 4


def test_preprocessing_more_images_takes_no_more_memory(workspace: Path) -> None:
    settings = {"preprocess.image_size": 512, "sample.image_size": 64, "runtime.workers": 2, "sample.val_images": 40}
    measured = []
    for num_images in (100, 1000):  # 79 and 786 MB packed
        set_params(workspace / "params.yaml", settings | {"sample.train_images": num_images})
        run(workspace, sys.executable, "-m", "stages.extract", environment={"PYTHONPATH": str(ROOT)})
        measured.append(peaks("preprocess", workspace))
    for small, large in zip(*measured, strict=True):  # the process itself, its largest worker
        assert large - small < LIMIT / 2
    assert (workspace / "data/processed/train_images.npy").stat().st_size > 3 * LIMIT
