"""The comparison with PyTorch measures real processes, and reports what it measured."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import pytest

from tests.helpers import run
from tools.benchmark.predict import Times, _summary, table


def test_start_up_is_taken_out_of_the_speed() -> None:
    row = _summary([Times(1.0, 3.0, 0.5, 2.5), Times(0.5, 1.5, 0.4, 1.4), Times(2.0, 7.0, 0.6, 4.6)], 101)
    assert row["start_s"] == {"median": 1.0, "rounds": [1.0, 0.5, 2.0]}
    assert row["images_per_second"] == {"median": 50.0, "rounds": [50.0, 100.0, 20.0]}
    assert row["start_cpu_s"]["median"] == 0.5
    assert row["images_per_cpu_second"]["rounds"] == pytest.approx([50, 100, 25])
    told = "| ours | 1.00 (0.50 to 2.00) | 50 (20 to 100) | 0.50 (0.40 to 0.60) | 50 (25 to 100) |"
    assert table({"ours": row}).splitlines()[-1] == told


@pytest.mark.slow
def test_it_measures_whole_processes_that_agree(repository: Path) -> None:
    command = ["-m", "tools.benchmark.predict", "--rounds", "2", "--repeat", "2", "--threads", "1"]
    printed = run(repository, sys.executable, *command).stdout
    report = json.loads((repository / "benchmarks/predict.json").read_text())
    assert report["settings"] == {"num_images": 120, "rounds": 2, "threads": 1}
    assert {"onnxruntime", "torch fp32"} <= set(report["results"])
    for row in report["results"].values():
        for numbers in row.values():
            assert len(numbers["rounds"]) == 2
            assert min(numbers["rounds"]) > 0
            assert numbers["median"] == statistics.median(numbers["rounds"])
    assert table(report["results"]) in printed
    starts = {name: row["start_s"]["median"] for name, row in report["results"].items()}
    assert 2 * starts["onnxruntime"] < starts["torch fp32"]
    assert run(repository, "git", "status", "--porcelain").stdout == "", "the results are ignored"
