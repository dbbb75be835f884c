"""Sweeps with the real Optuna, dvc queue and training runs, on the tiny repository."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.helpers import run

SPACE = ("train.lr=tag(log,interval(0.001,0.1))", "train.label_smoothing=choice(0.0,0.1)")
COMMAND = ("python", "-m", "tools.sweep", *SPACE, "--target", "evaluate", "--study", "tiny", "--no-prune")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train.lr=0.1",), "nothing to search"),
        (("train.lrr=interval(0.1,1)",), "train.lr"),
        (("train.lr=interval(-1,1)",), "train.lr"),
        (("train.lr=interval(0.1,1)", "--trials", "0"), "at least 1"),
        (("train.lr=interval(0.1,1)", "--metric", "metrics/nothing.json:top1"), "not a metrics file of dvc.yaml"),
    ],
)
def test_what_cannot_be_searched_is_refused_by_name(words: tuple[str, ...], message: str, repository: Path) -> None:
    result = run(repository, "python", "-m", "tools.sweep", *words, check=False)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.startswith("sweep: error: ")
    assert "Traceback" not in result.stderr
    assert run(repository, "git", "status", "--porcelain").stdout == ""


@pytest.mark.slow
def test_a_sweep_is_taken_up_and_its_best_applied(repository: Path) -> None:
    params = (repository / "params.yaml").read_bytes()
    said = run(repository, *COMMAND, "--trials", "2", "--workers", "2").stdout
    assert "tiny-0" in said
    assert (repository / "params.yaml").read_bytes() == params
    assert run(repository, "git", "status", "--porcelain").stdout == ""
    # the same command with more trials goes on
    said = run(repository, *COMMAND, "--trials", "4", "--workers", "2").stdout
    assert "study tiny, 2 of 4 trials are there" in said
    with (repository / "sweeps/tiny/trials.csv").open() as file:
        trials = list(csv.DictReader(file))
    assert len(trials) == 4
    assert (repository / "sweeps/tiny/study.png").stat().st_size > 5_000
    names = run(repository, "dvc", "exp", "list", "--name-only").stdout.split()
    assert {f"tiny-{number}" for number in range(4)} <= set(names)
    # what it says applies the best
    command = next(line for line in said.splitlines() if "dvc exp apply" in line)
    best = command.split("dvc exp apply")[1].split()[0].strip("`")
    run(repository, "dvc", "exp", "apply", best)
    applied = YAML(typ="safe").load((repository / "params.yaml").read_text())["train"]["lr"]
    assert applied != YAML(typ="safe").load(params.decode())["train"]["lr"]
    assert run(repository, "dvc", "status", "train", "evaluate").stdout.strip() == "Data and pipelines are up to date."
