"""Much of everything: times and memory are told, and held to a bound."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.faults.reliability import case
from tests.helpers import ROOT, encoded, image_files, picture, run, set_params, write_files

pytestmark = [pytest.mark.slow, pytest.mark.faults]

# Runs a stage and tells the peak of its resident memory, in bytes.
MEASURED = """if True:
    import resource
    from stages import {stage}
    from stages.core.params import load_params
    {stage}.main(load_params({stage}.Params))
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def run_stage(folder: Path, stage: str) -> tuple[float, int]:
    """Seconds and peak memory (bytes) of a stage."""
    start = time.perf_counter()
    command = [sys.executable, "-c", MEASURED.format(stage=stage)]
    output = run(folder, *command, environment={"PYTHONPATH": str(ROOT)}).stdout
    return time.perf_counter() - start, int(output.split()[-1])


def many_images(folder: Path, count: int) -> Path:
    """A set of so many training images in ten classes, all of the same pixels."""
    content = encoded(picture(size=(8, 8)), "PNG")
    for split, number in (("train", count), ("val", 20)):
        for label in range(10):
            (folder / split / f"class-{label}").mkdir(parents=True)
        for index in range(number):
            (folder / split / f"class-{index % 10}" / f"{index}.png").write_bytes(content)
    return folder


@case("20,000 tiny images", "Time grows with the number and not with its square; memory stays below 500 MB.")
def test_many_images(workspace: Path, tmp_path: Path, measured: Callable[[str], None]) -> None:
    seconds: dict[int, float] = {}
    peak = 0
    for count in (4000, 20_000):
        source = many_images(tmp_path / str(count), count)
        set_params(workspace / "params.yaml", {"data.source": str(source), "preprocess.image_size": 8})
        some = [run_stage(workspace, stage) for stage in ("extract", "preprocess")]
        seconds[count], peak = sum(each[0] for each in some), max(peak, *(each[1] for each in some))
        shutil.rmtree(source)
    assert json.loads((workspace / "data/processed/meta.json").read_text())["num_images"]["train"] == 20_000
    assert seconds[20_000] < 5 * seconds[4000] * 2
    assert peak < 500e6
    measured(f"extract and preprocess in {seconds[20_000]:.0f} s (4,000: {seconds[4000]:.0f} s), {peak / 1e6:.0f} MB")


@pytest.mark.parametrize(
    ("kind", "gigabytes"),
    [
        pytest.param(kind, limit, marks=case(f"100 megapixels: {kind}", f"Packed in less than {limit:g} GB."), id=kind)
        for kind, limit in (("JPEG", 1.0), ("PNG", 1.5), ("16-bit TIFF", 2.5))
    ],
)
def test_a_large_image(
    kind: str, gigabytes: float, workspace: Path, tmp_path: Path, measured: Callable[[str], None]
) -> None:
    source = write_files(tmp_path / "set", image_files(num_train=2, num_val=1))
    if kind == "16-bit TIFF":
        Image.fromarray(np.full((10_000, 10_000), 128 * 257, dtype=np.uint16)).save(source / "train/cat/large.tif")
    else:
        image = picture(size=(10_000, 10_000))
        image.save(source / f"train/cat/large.{kind.lower()}", compress_level=1)  # which JPEG does not look at
        del image
    set_params(workspace / "params.yaml", {"data.source": str(source)})
    run_stage(workspace, "extract")
    seconds, peak = run_stage(workspace, "preprocess")
    assert peak < gigabytes * 1e9
    measured(f"{seconds:.1f} s, {peak / 1e9:.2f} GB")


@case("1,000 classes", "Extracted, packed, trained and evaluated, with pictures that can still be drawn.")
def test_many_classes(workspace: Path, tmp_path: Path, measured: Callable[[str], None]) -> None:
    content = encoded(picture(size=(32, 32)), "PNG")
    names = [f"class-{number:04d}" for number in range(1000)]
    source = write_files(tmp_path / "set", {
        f"{split}/{name}/{i}.png": content for name in names for split, count in (("train", 2), ("val", 1))
        for i in range(count)
    })  # fmt: skip
    set_params(
        workspace / "params.yaml",
        {"data.source": str(source), "train.batch_size": 200, "train.epochs": 1, "train.warmup_epochs": 0.0},
    )
    seconds = {stage: run_stage(workspace, stage)[0] for stage in ("extract", "preprocess", "train", "evaluate")}
    assert len(json.loads((workspace / "models/classifier/model.json").read_text())["classes"]) == 1000
    assert (workspace / "plots/evaluate/confusion.png").stat().st_size > 1000
    measured(", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items()))
