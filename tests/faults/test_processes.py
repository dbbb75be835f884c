"""Signals to the stage, to dvc, to both and to a queue's worker; two of everything at once, ten of one in a row."""

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
from tests.helpers import PATIENCE, ROOT, files, run, set_params, start, step_reached, wait_until

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
    output, _ = process.communicate(timeout=PATIENCE)
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
    output, _ = process.communicate(timeout=PATIENCE)
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
    said = [process.communicate(timeout=PATIENCE)[0] for process in both]
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
    said = [process.communicate(timeout=PATIENCE)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert set(run(repository, "dvc", "exp", "list", "--name-only").stdout.split()) == {"nearest", "box"}
    assert run(repository, "git", "status", "--porcelain").stdout == ""
    assert (repository / "dvc.lock").read_bytes() == before


@case(
    "ten forced runs in a row",
    "`dvc repro --force` makes everything again: dvc.lock stays the same to the byte, and git sees no change.",
)
def test_ten_forced_runs(repository: Path, measured: Callable[[str], None]) -> None:
    lock = (repository / "dvc.lock").read_bytes()
    begun = time.monotonic()
    for _ in range(10):
        said = run(repository, "dvc", "repro", "--force").stdout
        assert said.count("Running stage ") == len(STAGES), said
        assert (repository / "dvc.lock").read_bytes() == lock
        assert run(repository, "git", "status", "--porcelain").stdout == ""
    measured(f"{(time.monotonic() - begun) / 10:.0f} s each")


# Long enough to be struck in the middle: 300 steps, where the committed run has 6.
QUEUED = {name: ("-S", "train.epochs=100", "-S", f"train.seed={seed}") for seed, name in enumerate(("one", "two"), 5)}


def put(repository: Path, name: str) -> None:
    run(repository, "dvc", "exp", "run", "--queue", "-n", name, *QUEUED[name], "train")


def start_worker(repository: Path) -> None:
    """Not through a pipe: the worker inherits it, and keeps it open."""
    run(repository, "sh", "-c", "dvc queue start > /dev/null 2>&1")


def queue_status(repository: Path) -> dict[str, str]:
    """Queued, Running, Success or Failed, by name."""
    said = run(repository, "dvc", "queue", "status").stdout
    return dict(re.findall(r"^[0-9a-f]{7} +(\S+) .* (\w+) *$", said, flags=re.MULTILINE))


def working(repository: Path, *words: str) -> list[psutil.Process]:
    """The processes that work somewhere in a repository and have these words in their command."""
    found = []
    for process in psutil.process_iter():
        try:
            here = Path(process.cwd()).is_relative_to(repository) and process.status() != psutil.STATUS_ZOMBIE
            if here and all(word in process.cmdline() for word in words):
                found.append(process)
        except psutil.Error:  # ended meanwhile, or not ours
            continue
    return found


def finish_queue(repository: Path) -> None:
    """Start a worker, and wait until it has found nothing more to do."""
    start_worker(repository)
    wait_until(lambda: not working(repository), 300, poll=0.5)


def result(repository: Path, name: str) -> dict[str, str]:
    """What an experiment made of its training: the lock has the hashes of data and model."""
    reference = run(repository, "git", "for-each-ref", "--format=%(refname)", f"refs/exps/*/*/{name}").stdout.strip()
    paths = ("dvc.lock", "params.yaml", "metrics/train/metrics.json", "metrics/train/plots/metrics/train/loss.tsv")
    return {path: run(repository, "git", "show", f"{reference}:{path}").stdout for path in paths}


def words_of_stages(repository: Path) -> str:
    """What the queue's experiments said, all of them and all their tries."""
    return "".join(path.read_text() for path in sorted((repository / ".dvc/tmp/exps/run").glob("*/*.out")))


@pytest.fixture(scope="module")
def undisturbed(finished_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The results of the queued experiments where nobody was killed, in a repository with a cache of its own."""
    folder = tmp_path_factory.mktemp("undisturbed") / "repository"
    shutil.copytree(finished_repository, folder, symlinks=True)
    for name, settings in QUEUED.items():
        run(folder, "dvc", "exp", "run", "--temp", "-n", name, *settings, "train")
    return {name: result(folder, name) for name in QUEUED}


@pytest.mark.parametrize(
    "dvc_too",
    [
        pytest.param(
            False,
            marks=case(
                "queue worker killed",
                "The experiment's own dvc goes on to its end, then nothing is left running. The queue shows it as "
                "Running for ever, after `dvc queue kill` as Success, but nobody fetched it: queued again, it takes "
                "the result that is there. The next one waits for `dvc queue start`. Both end as if nobody had been "
                "killed.",
            ),
            id="worker",
        ),
        pytest.param(
            True,
            marks=case(
                "queue worker and its dvc killed",
                "The stage saves and ends by itself. The queue shows the experiment as Running for ever: `dvc queue "
                "kill` makes that Failed, and queued again it goes on from the checkpoint and ends as if nobody had "
                "been killed.",
            ),
            id="worker and dvc",
        ),
    ],
)
def test_a_queue_worker_is_killed(
    dvc_too: bool, repository: Path, undisturbed: dict[str, dict[str, str]], measured: Callable[[str], None]
) -> None:
    for name in QUEUED:
        put(repository, name)
    start_worker(repository)
    folders = repository / ".dvc/tmp/exps"
    # The workspace's record, which the experiment's folder begins with, is of 6 steps.
    wait_until(lambda: any(step_reached(folder) > 6 for folder in folders.glob("tmp*")), 300)
    (worker,) = working(repository, "queue-worker")
    (own_dvc,) = working(repository, "exec-run")
    (stage,) = working(repository, "stages.train")
    worker.kill()
    struck = time.monotonic()
    if dvc_too:
        own_dvc.kill()
    else:
        own_dvc.wait(timeout=PATIENCE)
    stage.wait(timeout=10)
    ended = time.monotonic() - struck
    wait_until(lambda: not working(repository), 30, poll=0.1)
    assert queue_status(repository) == {"one": "Running", "two": "Queued"}

    # What the page of troubles says.
    run(repository, "dvc", "queue", "kill", "one")
    assert queue_status(repository) == {"one": "Failed" if dvc_too else "Success", "two": "Queued"}
    assert run(repository, "dvc", "exp", "list", "--name-only").stdout == ""  # Success or not: nobody fetched it
    run(repository, "dvc", "queue", "remove", "one")
    put(repository, "one")
    finish_queue(repository)
    assert queue_status(repository) == {"one": "Success", "two": "Success"}
    said = words_of_stages(repository)
    assert said.count("train: goes on after step ") == int(dvc_too), said
    assert said.count("Stage 'train' is cached - skipping run") == int(not dvc_too), said
    assert {name: result(repository, name) for name in QUEUED} == undisturbed
    assert run(repository, "git", "status", "--porcelain").stdout == ""
    measured(f"the stage ended {'by itself ' if dvc_too else ''}{ended:.1f} s after the blow")
