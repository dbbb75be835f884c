from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.helpers import image_files, run, write_files
from tools.benchmark.accuracy import verdict

COMMAND = (sys.executable, "-m", "tools.benchmark.accuracy")


def test_it_trains_both_and_reports_what_they_cost(repository: Path, tmp_path: Path) -> None:
    images = write_files(tmp_path / "images", image_files(num_train=12))
    words = ("--data", str(images), "--epochs", "1", "--ours", "1,2", "train.batch_size=8", "train.warmup_epochs=0")
    printed = run(repository, *COMMAND, *words).stdout

    report = json.loads((repository / "benchmarks/accuracy.json").read_text())
    assert [row["epochs"] for row in report["ours"]] == [1, 2]
    assert report["plain"]["epochs"] == 1
    for row in [*report["ours"], report["plain"]]:
        assert row["cpu_seconds"] > 0
        assert row["top1"] in {0, 0.25, 0.5, 0.75, 1}, "of four validation images"
    assert report["settings"]["params"]["train"]["batch_size"] == 8
    assert verdict(report["ours"], report["plain"]) in printed
    assert run(repository, "git", "status", "--porcelain").stdout == "", "the results are ignored, nothing is left"


def test_the_cheapest_that_is_as_accurate_is_compared() -> None:
    plain = {"epochs": 5, "top1": 0.7, "cpu_seconds": 300.0}
    ours = [{"epochs": n, "top1": top1, "cpu_seconds": 50.0 * n} for n, top1 in ((1, 0.6), (2, 0.7), (3, 0.8))]
    assert verdict(ours, plain).endswith("Ours is as accurate with train.epochs=2, in 3.00 times less CPU time")
    assert verdict(ours[:1], plain).endswith("None of ours is as accurate as the plain loop: more epochs in --ours")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "no/such.tgz"], "--data: no/such.tgz: no such file or folder"),
        (["--data", ".", "--recipe", "nono"], "recipes/nono.yaml: no such recipe"),
        (["--data", ".", "train.lr=0.1,0.2"], "train.lr=0.1,0.2: one value, not several"),
        (["--data", ".", "trian.lr=0.1"], "did you mean 'train.lr'?"),
    ],
)
def test_wrong_input_is_refused(repository: Path, words: list[str], message: str) -> None:
    result = run(repository, *COMMAND, *words, check=False)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
