"""Sweeps with the real Optuna, dvc queue and training runs, on the tiny repository."""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from ruamel.yaml import YAML

from stages.core.errors import InputError
from stages.core.params import read_params
from stages.core.runtime import num_cpus
from tests.helpers import DEFAULT_PARAMS, PATIENCE, ROOT, run, start, step_reached, wait_until
from tools.shared import dvc_queue
from tools.shared import overrides as settings
from tools.shared.overrides import parse
from tools.sweep.command import _typed, check_queue, code_of_stages, direction_of, gpus
from tools.sweep.study import Question, counted, distribution, open_study
from tools.sweep.trials import Run, Sweep

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
        (
            ("train.lr=interval(0.1,1)", "--target", "train"),
            "--target: train ends before evaluate, which writes metrics/evaluate.json:top1",
        ),
        (("train.lr=interval(0.1,1)", "--target", "tran"), "Stage 'tran' not found"),
        (("train.lr=interval(0.1,1)", "--seed", str(2**31)), "--seed: 2147483648 must be below"),
        (("train.lr=interval(0.1,1)", "--devices", "0,1"), "--devices: runtime.device: '0' is"),
    ],
)
def test_what_cannot_be_searched_is_refused_by_name(words: tuple[str, ...], message: str, repository: Path) -> None:
    result = run(repository, "python", "-m", "tools.sweep", *words, check=False)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.startswith("sweep: error: ")
    assert "Traceback" not in result.stderr
    assert run(repository, "git", "status", "--porcelain").stdout == ""


def test_a_range_of_decimals_has_all_its_values() -> None:
    """Every range of hundredths against whole numbers."""
    for low, step, count in itertools.product(range(0, 100, 10), (2, 5, 10, 20), range(2, 9)):
        word = f"train.label_smoothing=range({low / 100},{(low + count * step) / 100},{step / 100})"
        (override,) = parse([word])[1]
        found = distribution(override, 0.1)
        assert isinstance(found, FloatDistribution)
        assert found.step == step / 100
        assert round(found.low * 100) == low
        assert round(found.high * 100) == low + (count - 1) * step, word


@pytest.mark.parametrize(
    ("word", "now", "kind"),
    [
        ("train.flip=interval(0,1)", 0, FloatDistribution),
        ("train.ema_decay=interval(0.9,0.999)", 0, FloatDistribution),
        ("train.grad_clip=interval(1,5)", 1, FloatDistribution),
        ("train.epochs=interval(2,9)", 4, IntDistribution),
    ],
)
def test_a_key_that_is_written_as_a_whole_number_may_take_fractions(
    word: str, now: int, kind: type[BaseDistribution], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (override,) = parse([word])[1]
    base = settings.changed(read_params(DEFAULT_PARAMS), {override.key_or_group: now})
    assert isinstance(distribution(override, _typed(base, override)), kind)


def test_whole_numbers_have_whole_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (override,) = parse(["train.epochs=interval(2.5,9)"])[1]
    with pytest.raises(InputError, match=r"^train\.epochs=interval\(2\.5,9\): train\.epochs is a whole number"):
        distribution(override, 4)


def test_what_is_searched_is_not_shared_out() -> None:
    two = IntDistribution(1, 2)
    for devices, key, shared in (
        ([], "train.epochs", {"runtime.threads": 1}),
        ([], "runtime.threads", {}),
        (["cuda:0", "cuda:1"], "train.epochs", {"runtime.device": "cuda:1"}),
        (["cuda:0", "cuda:1"], "runtime.device", {"runtime.threads": 1}),
    ):
        question = Question([], {}, {key: two}, "metrics/evaluate.json:top1", "maximize", "code")
        arguments = argparse.Namespace(devices=devices, workers=num_cpus())
        sweep = Sweep(arguments, optuna.create_study(study_name="study"), question, "evaluate", 0)
        assert sweep._share(1) == shared


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        ("metrics/evaluate.json:top1", "maximize"),
        ("metrics/evaluate.json:nll", "minimize"),
        ("metrics/profile.json:images_per_second", "maximize"),
        ("metrics/profile.json:step_ms_p50", "minimize"),
        ("metrics/profile.json:data_wait_share", "minimize"),
        ("metrics/export.json:size_mb", "minimize"),
        ("metrics/export.json:largest_difference", "minimize"),
        ("metrics/drift.json:false_alarms.50.worst", "minimize"),
        ("metrics/drift.json:detection.50", "maximize"),
    ],
)
def test_the_name_of_a_metric_says_what_is_better(metric: str, direction: str) -> None:
    assert direction_of(metric) == direction


def test_a_study_is_taken_up_by_the_same_question_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, BaseDistribution] = {"train.lr": FloatDistribution(0.1, 1.0)}
    base = {"train": {"lr": 0.3, "epochs": 2}}

    def take_up(base: dict[str, Any], code: str = "one") -> None:
        open_study("study", Question([], {}, space, "metrics/evaluate.json:top1", "maximize", code), base, 0, 3)

    take_up(base)
    take_up({"train": {"lr": 0.9, "epochs": 2}})  # as where the best has been applied
    with pytest.raises(InputError, match=r"study study has asked something else: train\.epochs was 2, is 3; use"):
        take_up({"train": {"lr": 0.3, "epochs": 3}})
    with pytest.raises(InputError, match="its trials ran other code of the stages; use another --study"):
        take_up(base, "two")


def test_the_code_of_the_stages_is_told_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy2(ROOT / "dvc.yaml", tmp_path)
    shutil.copytree(ROOT / "stages", tmp_path / "stages")
    before = code_of_stages()
    assert code_of_stages() == before
    with Path("stages/core/augment.py").open("a") as file:
        file.write("\n")
    assert code_of_stages() != before


def test_a_trial_that_somebody_takes_off_the_queue_is_given_up(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    monkeypatch.setattr("tools.sweep.trials._NUDGE_SECONDS", 0.0)
    space: dict[str, BaseDistribution] = {"train.epochs": IntDistribution(1, 9)}
    study = optuna.create_study(study_name="study")
    question = Question([], {}, space, "metrics/evaluate.json:top1", "maximize", "code")
    sweep = Sweep(argparse.Namespace(workers=1), study, question, "evaluate", 0)
    waiting = Run(study.ask(space), "study-0", 0, b"")
    dvc_queue._dvc("exp", "run", "--queue", "--name", "study-0", "evaluate")
    monkeypatch.setattr(dvc_queue, "start_workers", lambda count, trust: None)  # so that it waits
    for _ in range(3):
        assert not sweep._settled(waiting)
    run(repository, "dvc", "queue", "remove", "study-0")
    assert not sweep._settled(waiting), "a daemon may be taking it"
    assert sweep._settled(waiting)
    (trial,) = study.trials
    assert (trial.state, trial.user_attrs["reason"]) == (TrialState.FAIL, "it was taken off dvc's queue")
    assert counted(study) == [trial], "and not tried again"


@pytest.mark.slow
def test_a_sweep_is_taken_up_and_its_best_applied(repository: Path) -> None:
    params = (repository / "params.yaml").read_bytes()
    before = run(repository, *COMMAND, "--trials", "2", "--workers", "2").stdout
    assert "tiny-0" in before
    assert (repository / "params.yaml").read_bytes() == params
    assert run(repository, "git", "status", "--porcelain").stdout == ""
    # the same command with more trials goes on
    said = run(repository, *COMMAND, "--trials", "4", "--workers", "2").stdout
    assert "study tiny, 2 of 4 trials are there" in said
    states = {trial["experiment"]: trial["state"] for trial in _trials(repository, "tiny")}
    complete = {name for name, state in states.items() if state == "complete"}
    assert len(complete) == 4
    # The second call meets the first one's daemons as they end: dvc may give one of them a trial.
    assert len(states) == 4 + _tried_again(before + said)
    assert (repository / "sweeps/tiny/study.png").stat().st_size > 5_000
    names = run(repository, "dvc", "exp", "list", "--name-only").stdout.split()
    assert set(names) == complete
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
    assert said.rstrip().endswith("dvc exp apply hopeless-0 && dvc repro")
    good, hopeless = _trials(repository, "hopeless")
    assert (good["train.lr"], good["state"], good["epochs"]) == ("0.01", "complete", "90")
    assert (hopeless["train.lr"], hopeless["state"], hopeless["top1"]) == ("1e-07", "pruned", "")
    assert 1 < int(hopeless["epochs"]) < 90
    _is_tidy(repository, ["hopeless-0"])
    assert "hopeless-1" not in run(repository, "dvc", "queue", "status").stdout


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["the sweep", "all of it"])
def test_a_sweep_killed_in_mid_trial_goes_on(killed: str, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = (repository / "params.yaml").read_bytes()
    command = _long_trials("killed")
    sweep = start(repository, *command)
    wait_until(lambda: _step(repository) > 3)
    sweep.kill()
    sweep.communicate()
    if killed == "all of it":  # as when the machine goes down, but that the stage sees its dvc gone, and saves
        for process in _processes(repository):
            if not _is_stage(process):
                process.kill()
    said = run(repository, *command).stdout
    if killed == "the sweep":
        assert "sweep: killed-0 was left running and is taken up" in said
        names = ["killed-0", "killed-1"]
    else:
        assert "sweep: killed-0 was broken off and is tried again" in said
        names = ["killed-1", "killed-2"]
    trials = _trials(repository, "killed")
    assert [trial["experiment"] for trial in trials if trial["state"] == "complete"] == names
    assert all(trial["state"] == "interrupted" for trial in trials if trial["experiment"] not in names)
    assert len({trial["train.lr"] for trial in trials}) == 2
    assert (repository / "params.yaml").read_bytes() == params
    _is_tidy(repository, names)
    # What dvc lists as running for ever keeps no other sweep from beginning, nor this one from beginning anew.
    monkeypatch.chdir(repository)
    check_queue("other", is_new=True)
    run(repository, "dvc", "exp", "remove", *names)
    check_queue("killed", is_new=True)
    assert dvc_queue.listed() == {}
    assert dvc_queue.look("killed-0") == dvc_queue.Task("waiting")


@pytest.mark.slow
def test_a_sweep_that_is_asked_to_stop_stops_its_trials_and_goes_on_later(repository: Path) -> None:
    params = (repository / "params.yaml").read_bytes()
    command = _long_trials("asked")
    before = ""
    # once while dvc makes the trial's folder, once in mid-training
    for moment in (lambda: len(_folders(repository)) > 0, lambda: _step(repository) > 3):
        sweep = start(repository, *command)
        wait_until(moment)
        sweep.send_signal(signal.SIGTERM)
        said, _ = sweep.communicate(timeout=PATIENCE)
        assert sweep.returncode == 143
        assert re.search(r"sweep: stopping asked-\d\n", said)
        assert "stopped by SIGTERM; run the same command again, and the study goes on" in said
        assert _stages(repository) == []
        before += said
    said = run(repository, *command).stdout
    *stopped, one, other = _trials(repository, "asked")
    assert {trial["state"] for trial in (one, other)} == {"complete"}
    assert {trial["state"] for trial in stopped} == {"interrupted"}
    assert len(stopped) == 2 + _tried_again(before + said)
    logs = "".join(path.read_text() for path in (repository / ".dvc/tmp/exps/run").glob("*/*.out"))
    assert logs.count("train: goes on after step ") >= 1  # 2 where the first was in training already
    assert (repository / "params.yaml").read_bytes() == params
    _is_tidy(repository, [one["experiment"], other["experiment"]])


@pytest.mark.slow
def test_a_trial_that_fails_costs_only_itself(repository: Path) -> None:
    command = ("python", "-m", "tools.sweep", "train.optimizer=sgd", "train.precision=fp32", *_UP_TO_EVALUATE)
    # With this seed the bad rate comes first.
    some = ("train.lr=choice(0.01,100000.0)", "--trials", "2", "--seed", "0", "--study", "some")
    said = run(repository, *command, *some).stdout
    assert said.rstrip().endswith("dvc exp apply some-1 && dvc repro")
    bad, good = _trials(repository, "some")
    assert (bad["train.lr"], bad["state"], bad["top1"]) == ("100000.0", "failed", "")
    assert "the run diverged; lower train.lr" in bad["reason"]
    assert (good["train.lr"], good["state"]) == ("0.01", "complete")
    every = run(
        repository, *command, "train.lr=choice(100000.0,200000.0)", "--trials", "1", "--study", "every", check=False
    )
    assert every.returncode == 1
    assert "the run diverged; lower train.lr" in every.stdout
    assert every.stdout.rstrip().endswith("sweep: no trial has a result; the reasons are in the table above")
    assert every.stderr == ""
    _is_tidy(repository, ["some-1"])
    # Begun anew under the same name: what became of the earlier trials is nothing to it.
    shutil.rmtree(repository / "sweeps/every")
    run(repository, *command, "train.lr=choice(0.01,0.02)", "--trials", "1", "--study", "every")
    assert [(trial["experiment"], trial["state"]) for trial in _trials(repository, "every")] == [
        ("every-0", "complete")
    ]
    _is_tidy(repository, ["every-0", "some-1"])


def _long_trials(study: str) -> tuple[str, ...]:
    space = ("train.lr=interval(0.005,0.02)", "train.epochs=60")
    return ("python", "-m", "tools.sweep", *space, *_UP_TO_EVALUATE, "--study", study, "--trials", "2", "--no-prune")


def _folders(repository: Path) -> list[Path]:
    return list((repository / ".dvc/tmp/exps").glob("tmp*"))


def _step(repository: Path) -> int:
    """How far a trial is that runs: the workspace's own record, which its folder begins with, is of 6 steps."""
    return max((step for step in map(step_reached, _folders(repository)) if step != 6), default=0)


def _trials(repository: Path, study: str) -> list[dict[str, str]]:
    with (repository / f"sweeps/{study}/trials.csv").open() as file:
        return list(csv.DictReader(file))


def _tried_again(said: str) -> int:
    """How many trials were tried again, each as another: those that dvc gave to a daemon which was just ending."""
    return said.count("it is tried again")


def _is_tidy(repository: Path, experiments: list[str]) -> None:
    """Just these experiments are there, git sees no change, and no process or folder of a run is left."""
    assert sorted(run(repository, "dvc", "exp", "list", "--name-only").stdout.split()) == experiments
    assert run(repository, "git", "status", "--porcelain").stdout == ""
    wait_until(lambda: _processes(repository) == [], poll=0.5)  # dvc's daemons wait 10 seconds for more
    assert _folders(repository) == []


def _processes(repository: Path) -> list[psutil.Process]:
    """The processes that work somewhere in a repository."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(repository) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # ended meanwhile, or not ours
            continue
    return found


def _stages(repository: Path) -> list[psutil.Process]:
    return [process for process in _processes(repository) if _is_stage(process)]


def _is_stage(process: psutil.Process) -> bool:
    try:
        return any(word.startswith("stages.") for word in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def test_gpus_are_counted_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what NVIDIA's tool says on a laptop, whose GPU has the word in its name."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA GeForce RTX 4070 Laptop GPU (UUID: GPU-1)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus() == ["cuda:0"]
