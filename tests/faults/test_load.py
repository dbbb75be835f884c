"""Much of everything: times and memory are told, and held to a bound."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.faults.reliability import case
from tests.helpers import ROOT, encoded, image_files, picture, run, set_params, write_files
from tools.registry import versions
from tools.shared import dvc_queue

pytestmark = [pytest.mark.slow, pytest.mark.faults]

# Run something and tell its CPU time, with that of its workers, in seconds (what else the machine does changes it
# little), and the peak of its resident memory, in KiB. (getrusage would tell that of the process that started it, where
# that is more.)
MEASURED = """if True:
    {what}
    import os
    peak = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0]
    print("\\ncost", sum(os.times()[:4]), peak)
"""
STAGE = """from stages import {stage}
    from stages.core.params import load_params
    {stage}.main(load_params({stage}.Params))"""
DVC = """from dvc.cli import main
    assert main({words!r}) == 0"""


def run_measured(folder: Path, what: str) -> tuple[str, float, int]:
    """What was printed, CPU seconds and peak memory (bytes)."""
    command = [sys.executable, "-c", MEASURED.format(what=what)]
    said, _, cost = run(folder, *command, environment={"PYTHONPATH": str(ROOT)}).stdout.rpartition("\ncost ")
    seconds, peak = cost.split()
    return said, float(seconds), int(peak) * 1024


def run_stage(folder: Path, stage: str) -> tuple[float, int]:
    """CPU seconds and peak memory (bytes) of a stage."""
    return run_measured(folder, STAGE.format(stage=stage))[1:]


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
    measured(
        f"extract and preprocess in {seconds[20_000]:.0f} CPU s (4,000: {seconds[4000]:.0f} s), {peak / 1e6:.0f} MB"
    )


def tar_of_images(path: Path, count: int, num_contents: int = 4096) -> Path:
    """A tar of so many training images in ten classes, of some thousand different contents."""
    contents = [encoded(picture(seed, (8, 8)), "PNG") for seed in range(num_contents)]
    with tarfile.open(path, "w") as tar:
        for split, number in (("train", count), ("val", 20)):
            for index in range(number):
                content = contents[index % num_contents]
                info = tarfile.TarInfo(f"{split}/class-{index % 10}/{index:06}.png")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every member otherwise
    return path


@case(
    "200,000 tiny images",
    "Out of one tar: time grows with the number and not with its square; memory by less than 2.5 KB an image.",
)
def test_very_many_images(workspace: Path, tmp_path: Path, measured: Callable[[str], None]) -> None:
    seconds: dict[int, float] = {}
    peaks: dict[int, int] = {}
    try:
        for count in (20_000, 200_000):
            source = tar_of_images(tmp_path / "images.tar", count)
            set_params(workspace / "params.yaml", {"data.source": str(source), "preprocess.image_size": 8})
            some = [run_stage(workspace, stage) for stage in ("extract", "preprocess")]
            seconds[count], peaks[count] = sum(each[0] for each in some), max(each[1] for each in some)
        meta = json.loads((workspace / "data/processed/meta.json").read_text())
    finally:  # half a gigabyte that pytest would keep
        (tmp_path / "images.tar").unlink(missing_ok=True)
        shutil.rmtree(workspace / "data", ignore_errors=True)
    assert meta["num_images"]["train"] == 200_000
    assert meta["num_per_class"]["train"] == [20_000] * 10
    assert seconds[200_000] < 15 * seconds[20_000]
    assert peaks[200_000] - peaks[20_000] < 180_000 * 2500
    measured(
        f"extract and preprocess in {seconds[200_000]:.0f} CPU s (20,000: {seconds[20_000]:.0f} s), "
        f"{peaks[200_000] / 1e6:.0f} MB (20,000: {peaks[20_000] / 1e6:.0f} MB)"
    )


def add_experiments(repository: Path, first: int, last: int) -> None:
    """Experiments as `dvc exp run` leaves them, without its second for each: a commit on HEAD below refs/exps.

    Experiment `e<number>` has the learning rate number / 1e6 and the accuracy number / 1000.
    """
    head = run(repository, "git", "rev-parse", "HEAD").stdout.strip()
    params = (repository / "params.yaml").read_text()
    metrics = json.loads((repository / "metrics/evaluate.json").read_text())
    learning_rate = next(line for line in params.splitlines() if line.startswith("  lr: "))
    stream = ""
    for number in range(first, last):
        changed = {
            "params.yaml": params.replace(learning_rate, f"  lr: {number / 1e6:.6f}"),
            "metrics/evaluate.json": json.dumps(metrics | {"top1": number / 1000}),
        }
        stream += (
            f"commit refs/exps/{head[:2]}/{head[2:]}/e{number}\n"
            f"committer t <t@example.com> {1_700_000_000 + number} +0000\n"
            f"data 22\ndvc: commit experiment\nfrom {head}\n"
        )
        for name, text in changed.items():
            stream += f"M 100644 inline {name}\ndata {len(text.encode())}\n{text}\n"
    (repository / ".git/experiments").write_text(stream)
    run(repository, "sh", "-c", "git fast-import --quiet < .git/experiments")


@case(
    "500 experiments",
    "`dvc exp show` reads them in a time that grows with their number and not with its square, and the second time in "
    "seconds; the notebook, the sweep, the registry and the report find theirs among them.",
)
def test_many_experiments(repository: Path, monkeypatch: pytest.MonkeyPatch, measured: Callable[[str], None]) -> None:
    show = DVC.format(words=["exp", "show", "--csv"])
    seconds: dict[int, float] = {}
    peaks: dict[int, int] = {}
    for before, count in ((0, 100), (100, 500)):
        add_experiments(repository, before + 1, count + 1)
        shutil.rmtree(repository / ".dvc/tmp/exps/cache", ignore_errors=True)
        said, seconds[count], peaks[count] = run_measured(repository, show)
        rows = {row["Experiment"]: row for row in csv.DictReader(io.StringIO(said)) if row["Experiment"]}
        for number in range(1, count + 1):
            row = rows[f"e{number}"]
            assert (float(row["top1"]), float(row["params.yaml:train.lr"])) == (number / 1000, number / 1e6)
    assert seconds[500] < 10 * seconds[100]
    assert peaks[500] < 1e9
    again = run_measured(repository, show)[1]
    assert again < seconds[500] / 2
    assert len(run(repository, "dvc", "exp", "list", "--name-only").stdout.split()) == 500
    notebook = "import dvc.api; print(len(dvc.api.exp_show()))"  # what it reads them with
    assert int(run(repository, "python", "-c", notebook).stdout) == 502
    monkeypatch.chdir(repository)
    commits = dvc_queue.experiments("e*")
    assert len(commits) == 500
    assert versions.resolve("e321") == commits["e321"]
    run(repository, "python", "-m", "tools.report", "e321", "--against", "e123")
    assert "32.10%" in (repository / "report/report.md").read_text()
    measured(
        f"{seconds[500]:.0f} CPU s and {peaks[500] / 1e6:.0f} MB "
        f"(100: {seconds[100]:.0f} s, {peaks[100] / 1e6:.0f} MB), again {again:.0f} s"
    )


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
    measured(f"{seconds:.1f} CPU s, {peak / 1e9:.2f} GB")


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
    measured(", ".join(f"{stage} {value:.0f} CPU s" for stage, value in seconds.items()))
