"""Signals to the stage, to dvc and to both, at random moments; and two of everything at once."""

from __future__ import annotations

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

from tests.faults.reliability import case
from tests.helpers import ROOT, files, run, set_params, start, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.faults]

STAGES = ("extract", "preprocess", "train", "evaluate", "profile", "drift", "export")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TARGETS = ("stage", "dvc", "group")
# What Python itself says of Ctrl-C while a stage is being imported.
INTERRUPTED_IMPORT = re.compile(r"^Traceback \(most recent call last\):\n(?:  .*\n)+KeyboardInterrupt$", re.MULTILINE)
BLOWS = [(number, target) for number in SIGNALS for target in TARGETS]


def stage_below(process: subprocess.Popen[str], stage: str) -> psutil.Process | None:
    try:
        for child in psutil.Process(process.pid).children(recursive=True):
            if child.cmdline()[1:3] == ["-m", f"stages.{stage}"]:
                return child
    except psutil.Error:
        pass
    return None


def strike(folder: Path, stage: str, number: signal.Signals, target: str, after: float) -> str:
    """Run a stage under dvc and send it a signal some seconds after it has begun; returns what was said."""
    process = start(folder, "dvc", "repro", "--force", "--single-item", stage)
    found: list[psutil.Process] = []

    def has_begun() -> bool:
        if (child := stage_below(process, stage)) is not None:
            found.append(child)
        return bool(found) or process.poll() is not None

    wait_until(has_begun)
    time.sleep(after)
    if process.poll() is None:
        if target == "stage" and found and found[0].is_running():
            found[0].send_signal(number)
        elif target == "dvc":
            process.send_signal(number)
        elif target == "group":
            os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=120)
    for child in found:
        child.wait(timeout=10)  # gone by itself: nobody is left who writes
    return output


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(
            name,
            marks=case(
                f"{name} is struck",
                "Signals to the stage, dvc or both, thrice at random moments: nothing is left running or half-written, "
                "and the next `dvc repro` ends with the same bytes.",
            ),
            id=name,
        )
        for name in STAGES
    ],
)
def test_a_stage_is_struck(stage: str, repository: Path, measured: Callable[[str], None]) -> None:
    lock = (repository / "dvc.lock").read_bytes()
    places = [repository / name for name in ("data/raw", "data/processed", "models", "plots/evaluate", "plots/drift")]
    before = files(*places)
    chance = random.Random(STAGES.index(stage))
    blows = [BLOWS[(3 * STAGES.index(stage) + turn) % len(BLOWS)] for turn in range(3)]
    for number, target in blows:
        shutil.rmtree(repository / ".dvc/cache/runs", ignore_errors=True)
        output = strike(repository, stage, number, target, chance.uniform(0.05, 2.5))
        assert "Traceback" not in INTERRUPTED_IMPORT.sub("", output), output
    output = run(repository, "dvc", "repro", "--force", "--single-item", stage).stdout
    assert f"Running stage '{stage}'" in output
    run(repository, "dvc", "repro")
    assert (repository / "dvc.lock").read_bytes() == lock
    assert files(*places) == before
    assert not [path for path in repository.rglob(".*.new") if "/.dvc/" not in str(path)]
    measured(", ".join(f"{number.name} to {target}" for number, target in blows))


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(
            number, marks=case(f"workers, {number.name}", "Worker processes end with the stage."), id=number.name
        )
        for number in SIGNALS
    ],
)
def test_workers_end_with_their_stage(number: signal.Signals, workspace: Path) -> None:
    set_params(workspace / "params.yaml", {"runtime.workers": 2, "sample.train_images": 20_000})
    process = start(workspace, sys.executable, "-m", "stages.extract", environment={"PYTHONPATH": str(ROOT)})
    parent = psutil.Process(process.pid)
    written = workspace / "data/.raw.new/train.tar"  # images come out of the workers: both are at work
    wait_until(lambda: written.exists() and written.stat().st_size > 300_000)
    children = parent.children(recursive=True)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), output
    assert "Traceback" not in output, output
    if number != signal.SIGKILL:
        assert re.search(r"extract: (stopped by SIGTERM|interrupted); run the same command again", output)
        assert not list((workspace / "data").iterdir())


@case("two dvc repro at once", "One of them says that DVC is busy, or waits; what comes of it is whole.")
def test_two_repros(repository: Path) -> None:
    lock = (repository / "dvc.lock").read_bytes()
    command = ("dvc", "repro", "--force", "--single-item", "preprocess")
    both = [start(repository, *command) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert 0 in [process.returncode for process in both]
    for process, output in zip(both, said, strict=True):
        assert "Traceback" not in output
        assert process.returncode == 0 or re.search("lock|busy", output), output
    run(repository, "dvc", "repro")
    assert (repository / "dvc.lock").read_bytes() == lock


@case("two exp run --temp at once", "Both end, each with its own result, and the workspace stays as it was.")
def test_two_temporary_experiments(repository: Path) -> None:
    before = (repository / "dvc.lock").read_bytes()
    both = [
        start(
            repository, "dvc", "exp", "run", "--temp", "-S", f"preprocess.interpolation={way}", "-n", way, "preprocess"
        )
        for way in ("nearest", "box")
    ]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert set(run(repository, "dvc", "exp", "list", "--name-only").stdout.split()) == {"nearest", "box"}
    assert run(repository, "git", "status", "--porcelain").stdout == ""
    assert (repository / "dvc.lock").read_bytes() == before
