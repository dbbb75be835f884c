from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers import ROOT, image_files, run, write_files
from tools.benchmark.command import COMPARISONS, PARTS, Comparison, summarise, table

COMMAND = (sys.executable, "-m", "tools.benchmark", "--quick")


def test_it_measures_every_part_and_reports_what_it_measured(repository: Path, tmp_path: Path) -> None:
    images = write_files(tmp_path / "images", image_files(num_train=12))
    printed = run(repository, *COMMAND, "--rounds", "2", "--batch-size", "8", "--data", str(images)).stdout

    report = json.loads((repository / "benchmarks/latest.json").read_text())
    assert set(report) == {"date", "machine", "settings", "results"}
    assert {"cpu", "num_cpus", "threads", "device", "dtype", "torch"} <= set(report["machine"])
    assert report["settings"]["quick"] is True
    assert report["settings"]["data"] == "images"
    assert [row["name"] for row in report["results"]] == [row.name for row in COMPARISONS]
    for row in report["results"]:
        ours, baseline, ratio = row["ours"], row["baseline"], row["ratio"]
        assert len(ours["rounds"]) == len(baseline["rounds"]) == 2
        assert min(ours["rounds"] + baseline["rounds"]) > 0
        assert ratio["rounds"] == [a / b for a, b in zip(ours["rounds"], baseline["rounds"], strict=True)]
        assert (ratio["min"], ratio["max"]) == (min(ratio["rounds"]), max(ratio["rounds"]))
        assert ratio["median"] == statistics.median(ratio["rounds"])
    assert table(report["results"]) in printed
    share = next(row for row in report["results"] if row["name"] == "loading in a step")
    assert share["ratio"]["max"] < 1

    with Image.open(repository / "benchmarks/latest.png") as picture:
        assert picture.width > 800
    assert run(repository, "git", "status", "--porcelain").stdout == "", "the results are ignored, nothing is left"


def test_a_target_is_reached_by_the_median() -> None:
    rounds = [{"a": 4.0, "b": 2.0}, {"a": 9.0, "b": 3.0}, {"a": 1.0, "b": 1.0}]
    assert {row.part for row in COMPARISONS} == set(PARTS)
    for target, at_most, reached in ((2.0, False, True), (2.1, False, False), (2.0, True, True), (1.9, True, False)):
        row = Comparison("train", "step", "img/s", ("ours", "a"), ("theirs", "b"), target, at_most)
        result = summarise(row, rounds)
        assert result["ratio"] == {"median": 2.0, "min": 1.0, "max": 3.0, "rounds": [2.0, 3.0, 1.0]}
        assert result["target"] == {"value": target, "at_most": at_most, "reached": reached}
        assert ("missed" in table([result])) is not reached


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "no/such.tgz"], "no/such.tgz: no such file or folder"),
        (["--only", "train,trian"], "--only: 'trian' is no part (valid: train, preprocess, loader, compute, dvc)"),
        (["--size", "4000"], "--size: 4000 px; valid: 16 to 512"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments: list[str], message: str, workspace: Path) -> None:
    result = run(workspace, *COMMAND, *arguments, check=False, environment={"PYTHONPATH": str(ROOT)})
    assert result.returncode == 2
    assert result.stderr.startswith("benchmark: error: --")
    assert message in result.stderr
    assert not (workspace / "benchmarks").exists()


def test_a_set_smaller_than_a_batch_is_refused(workspace: Path) -> None:
    images = write_files(workspace / "images", image_files(num_train=2))
    result = run(workspace, *COMMAND, "--data", str(images), check=False, environment={"PYTHONPATH": str(ROOT)})
    assert result.returncode == 2
    assert "--batch-size: 20 is more than the 4 training images" in result.stderr
