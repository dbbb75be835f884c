"""Sweeps with the real Optuna, dvc queue and training runs, on the tiny repository."""

from __future__ import annotations

import csv
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

from tests.helpers import run, wait_until

SPACE = ("train.lr=tag(log,interval(0.001,0.1))", "train.label_smoothing=choice(0.0,0.1)")
COMMAND = ("python", "-m", "tools.sweep", *SPACE, "--target", "evaluate", "--study", "tiny", "--no-prune")
_UP_TO_EVALUATE = ("--target", "evaluate")


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


@pytest.mark.slow
def test_a_hopeless_trial_is_stopped_in_mid_run(repository: Path) -> None:
    # With this seed the good rate comes first, so there is something to be worse than.
    command = ("train.lr=choice(0.0000001,0.01)", "train.epochs=90", "--trials", "2", "--startup", "1", "--seed", "0")
    said = run(repository, "python", "-m", "tools.sweep", *command, *_UP_TO_EVALUATE, "--study", "hopeless").stdout
    assert _stages(repository) == []
    assert "sweep: hopeless-1 is pruned after epoch" in said
    assert said.rstrip().endswith("dvc exp apply hopeless-0")
    good, hopeless = _trials(repository, "hopeless")
    assert (good["train.lr"], good["state"], good["epochs"]) == ("0.01", "complete", "90")
    assert (hopeless["train.lr"], hopeless["state"], hopeless["top1"]) == ("1e-07", "pruned", "")
    assert 1 < int(hopeless["epochs"]) < 90
    _is_tidy(repository, ["hopeless-0"])
    assert "hopeless-1" not in run(repository, "dvc", "queue", "status").stdout


def _trials(repository: Path, study: str) -> list[dict[str, str]]:
    with (repository / f"sweeps/{study}/trials.csv").open() as file:
        return list(csv.DictReader(file))


def _is_tidy(repository: Path, experiments: list[str]) -> None:
    """Just these experiments are there, git sees no change, and no process or folder of a run is left."""
    assert sorted(run(repository, "dvc", "exp", "list", "--name-only").stdout.split()) == experiments
    assert run(repository, "git", "status", "--porcelain").stdout == ""
    wait_until(lambda: _processes(repository) == [], 60, poll=0.5)  # dvc's daemons wait 10 seconds for more
    assert list((repository / ".dvc/tmp/exps").glob("tmp*")) == []


def _processes(repository: Path) -> list[list[str]]:
    """Command lines of the processes that work somewhere in a repository."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(repository) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.cmdline())
        except psutil.Error:  # ended meanwhile, or not ours
            continue
    return found


def _stages(repository: Path) -> list[list[str]]:
    return [words for words in _processes(repository) if any(word.startswith("stages.") for word in words)]
