"""A run that was killed or stopped goes on as if nothing had happened, to the bit."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.helpers import PATIENCE, ROOT, commit_all, files, run, set_params, start, step_reached, wait_until

# 36 steps; records every 2 and checkpoints every 5, so that most checkpoints lie between two records.
RECIPE = {"train.epochs": 12, "train.log_every": 2, "runtime.checkpoint_steps": 5, "runtime.checkpoint_seconds": None}
NUM_STEPS = 36


@pytest.fixture
def long_run(packed: Path) -> Path:
    set_params(packed / "params.yaml", RECIPE)
    return packed


def train(folder: Path) -> subprocess.Popen[str]:
    return start(folder, sys.executable, "-m", "stages.train", environment={"PYTHONPATH": str(ROOT)})


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    return output


def results(folder: Path) -> dict[str, bytes]:
    return files(folder / "models", folder / "metrics")


def clear(folder: Path) -> None:
    """What DVC does before it runs a stage."""
    for name in ("models", "metrics"):
        shutil.rmtree(folder / name, ignore_errors=True)


def uninterrupted(folder: Path) -> dict[str, bytes]:
    set_params(folder / "params.yaml", {"runtime.checkpoint_steps": None})
    finish(train(folder))
    set_params(folder / "params.yaml", RECIPE)
    expected = results(folder)
    clear(folder)
    return expected


def kill_at(step: int, folder: Path, then: float = 0.0) -> None:
    """Start training and kill it without warning, at a step or within the time `then` (seconds) after it."""
    process = train(folder)
    wait_until(lambda: step_reached(folder) >= step, poll=0.002)
    time.sleep(then)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    clear(folder)


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "cache/checkpoints").glob("*/step-*.pt"))


def check_kills(folder: Path, steps: list[int]) -> None:
    expected = uninterrupted(folder)
    assert not checkpoints(folder), "a finished run leaves no checkpoint"
    generator = random.Random(0)
    for i, step in enumerate(steps):
        set_params(folder / "params.yaml", {"runtime.workers": i % 3})
        kill_at(step, folder, then=generator.uniform(0, 0.03))
        assert len(checkpoints(folder)) <= 3, "two, or a third that was written when the kill came"
        set_params(folder / "params.yaml", {"runtime.workers": (i + 1) % 3})
        output = finish(train(folder))
        assert re.search(r"train: goes on after step \d+ of 36", output), "started over"
        assert results(folder) == expected, f"killed at step {step}: another result"
        clear(folder)


def test_a_killed_run_ends_with_the_same_bytes(long_run: Path) -> None:
    check_kills(long_run, [14, 27])


@pytest.mark.slow
def test_20_of_20_killed_runs_end_with_the_same_bytes(long_run: Path) -> None:
    check_kills(long_run, random.Random(1).sample(range(6, 33), 20))


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [
    {"train.optimizer": "muon", "train.progressive": 16, "train.grad_accumulation": 2},
    {"train.optimizer": "sgd", "train.precision": "fp32", "train.grad_clip": 1.0, "train.ema_decay": 0.0},
    {"model.name": "test_vit", "preprocess.image_size": 160, "train.image_size": 160, "train.batch_size": 6},
])  # fmt: skip
def test_every_recipe_goes_on_to_the_bit(overrides: dict[str, object], long_run: Path) -> None:
    set_params(long_run / "params.yaml", overrides | {"train.epochs": 6})
    run(long_run, sys.executable, "-m", "stages.preprocess", environment={"PYTHONPATH": str(ROOT)})
    recipe = RECIPE | {"train.epochs": 6, "runtime.checkpoint_steps": 4}
    set_params(long_run / "params.yaml", recipe | {"runtime.checkpoint_steps": None})
    finish(train(long_run))
    expected = results(long_run)
    clear(long_run)
    set_params(long_run / "params.yaml", recipe)
    kill_at(10, long_run)
    assert "goes on after step" in finish(train(long_run))
    assert results(long_run) == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(number: signal.Signals, long_run: Path) -> None:
    expected = uninterrupted(long_run)
    set_params(long_run / "params.yaml", {"runtime.checkpoint_steps": None})
    process = train(long_run)
    wait_until(lambda: step_reached(long_run) >= 6)
    start_time = time.monotonic()
    process.send_signal(number)
    output, _ = process.communicate(timeout=PATIENCE)
    assert time.monotonic() - start_time < 5
    assert process.returncode == 128 + number
    last = output.strip().splitlines()[-1]
    message = (
        rf"train: stopped by {number.name}; (\d+) of 36 steps are done and saved in .*: run the same command again"
    )
    match = re.match(message, last)
    assert match, output
    assert "Traceback" not in output
    assert not (long_run / "models/classifier").exists()
    clear(long_run)
    assert f"goes on after step {match[1]} of 36" in finish(train(long_run))
    assert results(long_run) == expected


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(long_run: Path) -> None:
    expected = uninterrupted(long_run)
    kill_at(24, long_run)
    newest = checkpoints(long_run)[-1]
    newest.write_bytes(newest.read_bytes()[:-1000])
    output = finish(train(long_run))
    assert f"{newest} is damaged" in output
    assert re.search(r"goes on after step \d+", output)
    assert results(long_run) == expected


def test_other_params_start_over(long_run: Path) -> None:
    kill_at(14, long_run)
    for override in ({"train.lr": 0.002}, {"train.seed": 1}):
        set_params(long_run / "params.yaml", override)
        assert "goes on" not in finish(train(long_run))


@pytest.mark.slow
def test_other_data_start_over(long_run: Path) -> None:
    kill_at(14, long_run)
    set_params(long_run / "params.yaml", {"preprocess.interpolation": "nearest", "sample.seed": 5})
    for stage in ("extract", "preprocess"):
        run(long_run, sys.executable, "-m", f"stages.{stage}", environment={"PYTHONPATH": str(ROOT)})
    assert "goes on" not in finish(train(long_run))


def test_divergence_names_the_last_good_checkpoint(long_run: Path) -> None:
    """The rate explodes after the warm-up: the first checkpoints are of a healthy run."""
    overrides = {
        "train.optimizer": "sgd",
        "train.lr": 1e12,
        "train.momentum": 0.9,
        "train.warmup_epochs": 11.9,
        "train.log_every": 10,
    }
    set_params(long_run / "params.yaml", overrides | {"runtime.checkpoint_steps": 1, "train.label_smoothing": 0.0})
    output, _ = (process := train(long_run)).communicate(timeout=PATIENCE)
    assert process.returncode == 2
    match = re.search(r"train: error: .*; the last good checkpoint is (\S+\.pt)|there is no checkpoint yet", output)
    assert match, output
    assert "lower train.lr" in output
    assert match[1] is None or Path(match[1]).exists()


@pytest.mark.slow
def test_two_runs_of_the_same_do_not_share_checkpoints(long_run: Path) -> None:
    process = train(long_run)
    wait_until(lambda: step_reached(long_run) >= 2)
    process.send_signal(signal.SIGSTOP)
    try:
        output, _ = (second := train(long_run)).communicate(timeout=PATIENCE)
        assert second.returncode == 2
        assert "another process trains with the same params, data and code" in output
    finally:
        process.send_signal(signal.SIGCONT)
    finish(process)


def run_in_little_memory(stage: str, folder: Path, allowed: int = 500_000_000) -> tuple[int, str]:
    """Exit status and output of a stage: the real allocator refuses under a real limit of the address space.

    `allowed`: bytes beside what is there when the modules are imported.
    """
    limited = f"""if True:
        import resource, torch, timm, dvclive
        from stages import {stage}
        from stages.core.errors import run_main
        from stages.core.params import load_params
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + {allowed},) * 2)
        run_main(lambda: {stage}.main(load_params({stage}.Params)), "{stage}")
    """
    process = start(folder, sys.executable, "-c", limited, environment={"PYTHONPATH": str(ROOT)})
    output, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, output


@pytest.mark.parametrize(("stage", "when"), [("train", "at step 0"), ("profile", "in the profile")])
def test_memory_that_runs_out_names_the_batch_size(stage: str, when: str, long_run: Path) -> None:
    set_params(long_run / "params.yaml", {"train.image_size": 1024, "train.batch_size": 60})
    status, output = run_in_little_memory(stage, long_run)
    assert status == 2, output
    assert f"{stage}: error: out of memory on cpu {when} with train.batch_size 60 and train.image_size 1024" in output
    assert "set train.grad_accumulation to 2" in output


def test_an_evaluation_whose_memory_runs_out_names_its_batch_size(packed: Path) -> None:
    assert run_in_little_memory("train", packed)[0] == 0
    description = packed / "models/classifier/model.json"
    spec = json.loads(description.read_text())
    description.write_text(json.dumps(spec | {"image_size": 2048}))
    status, output = run_in_little_memory("evaluate", packed)
    assert status == 2, output
    assert "error: params.yaml: evaluate.batch_size: 128: out of memory on cpu with images of 2048 px" in output
    assert not (packed / "metrics/evaluate.json").exists()


def test_the_validation_takes_no_more_memory_than_a_part_of_a_step(packed: Path) -> None:
    """One step on images of 16 px, then a validation on 60 of 1024 px: 755 MB, or 25 MB a part."""
    recipe = {"train.image_size": 1024, "train.progressive": 16, "train.batch_size": 60, "train.epochs": 1}
    set_params(packed / "params.yaml", recipe | {"train.warmup_epochs": 0.0, "train.precision": "fp32"})
    # Too little for the whole by far, and enough for a part by far: what convolutions take besides depends on the CPU.
    allowed = 700_000_000
    status, output = run_in_little_memory("train", packed, allowed)
    assert status == 2, output
    assert "train: error: out of memory on cpu in the validation after step 1 with train.batch_size 60" in output
    set_params(packed / "params.yaml", {"train.grad_accumulation": 30})
    status, output = run_in_little_memory("train", packed, allowed)
    assert status == 0, output


# --- under DVC


@pytest.fixture
def long_repository(make_repository: Callable[..., Path]) -> Path:
    folder = make_repository(**{key.replace(".", "__"): value for key, value in RECIPE.items()})
    run(folder, "dvc", "repro")
    commit_all(folder)
    return folder


def stage_process(parent: subprocess.Popen[str]) -> psutil.Process | None:
    """The process of the train stage below a dvc process."""
    for child in psutil.Process(parent.pid).children(recursive=True):
        try:
            if child.cmdline()[1:3] == ["-m", "stages.train"]:
                return child
        except psutil.Error:
            continue
    return None


def wait_for_training(process: subprocess.Popen[str], folder: Path) -> psutil.Process:
    """Wait until a run below dvc has written a checkpoint."""
    cache = Path(re.search(r"cache_dir: (\S+)", (folder / "params.yaml").read_text())[1])  # type: ignore[index]
    wait_until(lambda: bool(list(cache.glob("checkpoints/*/step-*.pt"))))
    stage = stage_process(process)
    assert stage is not None
    return stage


def result_of(folder: Path, experiment: str) -> tuple[str, str]:
    """The model's hash in an experiment's dvc.lock, and the history of its loss."""
    run(folder, "dvc", "exp", "branch", experiment, experiment)
    lock = run(folder, "git", "show", f"{experiment}:dvc.lock").stdout
    loss = run(folder, "git", "show", f"{experiment}:metrics/train/plots/metrics/train/loss.tsv").stdout
    return re.search(r"path: models/classifier\n\s+hash: md5\n\s+md5: (\w+)", lock)[1], loss  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.parametrize("where", [[], ["--temp"]])
def test_an_experiment_whose_stage_was_killed_goes_on(where: list[str], long_repository: Path) -> None:
    command = ["dvc", "exp", "run", *where, "-S", "train.lr=0.002", "-n"]
    run(long_repository, *command, "reference")
    run(long_repository, "git", "checkout", "-q", ".")
    expected = result_of(long_repository, "reference")
    forget_runs(long_repository)
    process = start(long_repository, *command, "killed")
    wait_for_training(process, long_repository).kill()
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0, output
    run(long_repository, "git", "checkout", "-q", ".")
    output = run(long_repository, *command, "killed").stdout
    assert re.search(r"train: goes on after step \d+ of 36", output), output
    assert result_of(long_repository, "killed") == expected


def forget_runs(folder: Path) -> None:
    run(folder, "rm", "-rf", ".dvc/cache/runs")


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_the_death_of_dvc_ends_the_stage_which_goes_on(number: signal.Signals, long_repository: Path) -> None:
    before = (long_repository / "dvc.lock").read_text()
    forget_runs(long_repository)
    set_params(long_repository / "params.yaml", {"runtime.checkpoint_steps": 1})
    process = start(long_repository, "dvc", "repro", "--force", "--single-item", "train")
    stage = wait_for_training(process, long_repository)
    os.kill(process.pid, number)
    stage.wait(timeout=60)
    output, _ = process.communicate(timeout=PATIENCE)
    assert "is gone; " in output, output
    assert "steps are done and saved in" in output
    output = run(long_repository, "dvc", "repro", "--force", "--single-item", "train").stdout
    assert "goes on after step" in output
    assert (long_repository / "dvc.lock").read_text() == before
    metrics = json.loads((long_repository / "metrics/train/metrics.json").read_text())
    assert metrics["step"] == NUM_STEPS
