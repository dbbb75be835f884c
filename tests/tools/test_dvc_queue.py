"""What dvc's files say of a task of the queue, at moments that last too short to be met by a whole run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.shared import dvc_queue

_RUNNING, _SUCCESS, _FAILED, _FINISHED = 2, 3, 4, 6


@pytest.fixture
def living() -> Iterator[int]:
    """A process whose command names dvc."""
    with subprocess.Popen([sys.executable, "-c", "input()", "dvc"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.kill()


@pytest.fixture
def another() -> Iterator[int]:
    """A process that is not dvc's, and has the number that one of dvc's had before the machine was started again."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.kill()


@pytest.fixture
def ended() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _task(status: int, pid: int | None, returncode: int | None = None, result: str | None = None) -> None:
    folder = Path(".dvc/tmp/exps/run/abc")
    folder.mkdir(parents=True)
    content = {"name": "tried-0", "root_dir": "/folder", "status": status, "result_ref": result}
    (folder / "abc.run").write_text(json.dumps(content))
    if pid is not None:
        (folder / "abc.json").write_text(json.dumps({"pid": pid, "returncode": returncode}))


def _daemon(pid: int) -> None:
    folder = Path(".dvc/tmp/exps/celery")
    folder.mkdir(parents=True)
    (folder / "dvc-exp-worker-1.json").write_text(json.dumps({"pid": pid, "returncode": None}))


def test_a_task_that_no_daemon_has_taken_waits() -> None:
    assert dvc_queue.look("tried-0") == dvc_queue.Task("waiting")


def test_a_process_that_lives_runs_whatever_became_of_its_daemon(living: int, ended: int) -> None:
    _task(_RUNNING, living)
    _daemon(ended)
    task = dvc_queue.look("tried-0")
    assert (task.state, task.folder, task.process) == ("running", Path("/folder"), living)


@pytest.mark.parametrize("status", [_RUNNING, _SUCCESS])
def test_a_process_that_has_just_ended_is_not_lost(living: int, ended: int, status: int) -> None:
    """Between its end and the daemon's writing down how it ended."""
    _task(status, ended)
    _daemon(living)
    task = dvc_queue.look("tried-0")
    assert (task.state, task.process) == ("running", None)


def test_a_process_whose_daemon_is_gone_too_is_lost(ended: int) -> None:
    _task(_RUNNING, ended)
    _daemon(ended)
    assert dvc_queue.look("tried-0").state == "lost"


def test_a_task_whose_daemon_was_killed_before_it_began_is_lost(ended: int) -> None:
    _task(1, None)
    _daemon(ended)
    assert dvc_queue.look("tried-0").state == "lost"


def test_a_number_that_another_program_has_by_now_is_not_dvc(another: int) -> None:
    _task(_RUNNING, another)
    _daemon(another)
    task = dvc_queue.look("tried-0")
    assert (task.state, task.process) == ("lost", None)


@pytest.mark.parametrize(
    ("status", "returncode", "result", "state"),
    [
        (_FINISHED, 0, "refs/exps/aa/bb/tried-0", "succeeded"),
        (_FINISHED, 0, None, "failed"),
        (_FAILED, None, None, "failed"),
        (_RUNNING, -9, None, "failed"),
    ],
)
def test_what_has_ended_is_known_without_a_daemon(
    ended: int, status: int, returncode: int | None, result: str | None, state: str
) -> None:
    _task(status, ended, returncode, result)
    assert dvc_queue.look("tried-0").state == state
