"""What dvc's files say of a task of the queue, at moments that last too short to be met by a whole run."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.core.errors import InputError
from tools.shared import dvc_queue

_PREPARING, _RUNNING, _SUCCESS, _FAILED, _FINISHED = 1, 2, 3, 4, 6


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[None]:
    """A process that is named as dvc's daemons are, and works in this folder."""
    command = [sys.executable, "-c", "input()", "dvc", "exp", "queue-worker", "dvc-exp-123456-1@localhost"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=tmp_path) as process:
        yield
        process.kill()


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


def test_a_stage_is_named_with_the_files_that_params_yaml_names_and_dvc_keeps() -> None:
    Path("params.yaml").write_text(
        "data:\n  source: sample\n  extra: retrain/x.tar\nmodel:\n  weights: /elsewhere/w.safetensors\n"
    )
    assert dvc_queue.pointers() == []
    for name in ("retrain/x.tar.dvc", "retrain/other.tar.dvc"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    assert dvc_queue.pointers() == ["retrain/x.tar.dvc"]
    words = ["-S", "data.extra='retrain/other.tar',null", "-S", "train.lr=0.1"]
    assert dvc_queue.pointers(words) == ["retrain/other.tar.dvc", "retrain/x.tar.dvc"]
    assert dvc_queue.named_files() == {"data.source": Path("sample"), "data.extra": Path("retrain/x.tar")}


def _task(status: int, pid: int | None, returncode: int | None = None, result: str | None = None) -> Path:
    folder = Path(".dvc/tmp/exps/run/abc")
    folder.mkdir(parents=True)
    content = {"name": "tried-0", "root_dir": "/folder", "status": status, "result_ref": result}
    (folder / "abc.run").write_text(json.dumps(content))
    path = folder / "abc.json"
    if pid is not None:
        path.write_text(json.dumps({"pid": pid, "returncode": returncode}))
    return path


def test_a_task_that_no_daemon_has_taken_waits() -> None:
    assert dvc_queue.look("tried-0") == dvc_queue.Task("waiting")


def test_a_process_that_lives_runs_whatever_became_of_its_daemon(living: int) -> None:
    _task(_RUNNING, living)
    task = dvc_queue.look("tried-0")
    assert (task.state, task.folder, task.process) == ("running", Path("/folder"), living)


@pytest.mark.parametrize("status", [_RUNNING, _SUCCESS])
@pytest.mark.usefixtures("daemon")
def test_a_process_that_has_just_ended_is_not_lost(ended: int, status: int) -> None:
    """Between its end and the daemon's writing down how it ended."""
    path = _task(status, ended)
    writing = threading.Timer(1.0, lambda: path.write_text(json.dumps({"pid": ended, "returncode": 0})))
    writing.start()
    task = dvc_queue.look("tried-0")
    writing.join()
    assert (task.state, task.process) == ("running", None)


@pytest.mark.usefixtures("daemon")
def test_a_process_that_was_killed_with_its_daemon_is_lost_though_another_daemon_lives(ended: int) -> None:
    _task(_RUNNING, ended)
    assert dvc_queue.look("tried-0").state == "lost"


@pytest.mark.usefixtures("daemon")
def test_a_task_whose_folder_is_being_made_runs() -> None:
    _task(_PREPARING, None)
    assert dvc_queue.look("tried-0").state == "running"


def test_a_task_whose_daemon_was_killed_before_it_began_is_lost() -> None:
    _task(_PREPARING, None)
    assert dvc_queue.look("tried-0").state == "lost"


def test_what_a_daemon_took_in_its_last_moment_is_lost() -> None:
    assert dvc_queue.is_lost("tried-0", "Running")
    assert not dvc_queue.is_lost("tried-0", "Queued")


@pytest.mark.usefixtures("daemon")
def test_what_a_daemon_has_just_taken_is_not_lost() -> None:
    assert not dvc_queue.is_lost("tried-0", "Running")


def test_a_number_that_another_program_has_by_now_is_not_dvc(another: int) -> None:
    _task(_RUNNING, another)
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


@pytest.mark.usefixtures("daemon")
def test_what_has_failed_is_removed_when_its_daemon_has_told_dvc(ended: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _task(_FAILED, ended)
    answers = ["Running", "Running", "Failed"]  # of dvc, one after the other
    removed: list[str] = []
    monkeypatch.setattr(dvc_queue, "listed", lambda: {"tried-0": answers.pop(0), "other-0": "Queued"})
    monkeypatch.setattr(dvc_queue, "_dvc", lambda *words, **_: removed.extend(words))
    dvc_queue.remove(["tried-0"])
    assert (removed, answers) == (["queue", "remove", "tried-0"], [])


METRICS = json.dumps(
    {"top1": 0.5, "detection": {"50": 0.9}, "contaminated": {"0.10": 0.7, "0": {"1": 0.2}}, "name": "a"}
)


@pytest.mark.parametrize(
    ("key", "value"),
    [("top1", 0.5), ("detection.50", 0.9), ("contaminated.0.10", 0.7), ("contaminated.0.1", 0.2)],
)
def test_a_metric_is_found_by_its_names_with_dots_between_them_and_in_them(key: str, value: float) -> None:
    assert dvc_queue.number_in(METRICS, key, "metrics.json") == value


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("top2", r"no 'top2' in it \(valid: top1, detection, contaminated, name\)"),
        ("", r"no '' in it \(valid: top1,"),
        ("top1.", "no '' in it$"),
        ("top1.a", "no 'a' in it$"),
        ("contaminated.0.20", r"no '20' in it \(valid: 1\)"),
        ("detection", "{'50': 0.9} is no number"),
        ("name", "'a' is no number"),
    ],
)
def test_a_metric_that_is_not_there_or_no_number_is_refused(key: str, message: str) -> None:
    with pytest.raises(InputError, match=f"metrics.json: {message}"):
        dvc_queue.number_in(METRICS, key, "metrics.json")
