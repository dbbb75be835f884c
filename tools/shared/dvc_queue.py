"""DVC's experiment queue, as a sweep needs it: queue one, watch it run, stop it, read its metrics.

`dvc queue start` runs queued experiments in daemons of their own, each in a folder below .dvc/tmp/exps. What DVC knows
of a task it keeps in .dvc/tmp/exps/run/<stash commit>/: `*.run` (name, folder, status), `*.json` (process), `*.out`
(its words). Reading these costs nothing, where `dvc queue status` takes a second of CPU time.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from stages.core.errors import InputError
from stages.core.params import read_params
from tools.shared.commands import environment

_TASKS = Path(".dvc/tmp/exps/run")
_FILE_KEYS = ("data.source", "data.extra", "model.weights")  # of params.yaml
_SEEN_SECONDS = 3.0  # for a daemon to write down how a process ended, on a machine with other work
_TOLD_SECONDS = 30.0  # for a daemon to tell dvc that one has failed
_FAILED, _CANCELED, _FINISHED = 4, 5, 6  # dvc.repo.experiments.executor.base.TaskStatus; 2 is running

State = Literal["waiting", "running", "succeeded", "failed", "lost"]  # lost: killed, and no daemon will say so


@dataclass(frozen=True)
class Task:
    """One experiment of the queue, as it is now."""

    state: State
    folder: Path | None = None  # where it runs
    process: int | None = None  # the dvc that runs its stages
    log: Path | None = None


def queue(name: str, words: Sequence[str], target: str, lock: int) -> None:
    """Queue an experiment that runs the pipeline up to `target`; InputError with dvc's words when it refuses.

    For some moments dvc changes params.yaml in the workspace and puts it back. So it gets a session of its own (an
    interrupt of ours does not reach it), and inherits the lock: nobody begins before it is done.
    """
    _dvc("exp", "run", "--queue", "--name", name, *words, target, *pointers(words), lock=lock)


def pointers(words: Sequence[str] = ()) -> list[str]:
    """The .dvc files of what params.yaml, or an override among `words`, names: targets for an experiment that has one.

    In a folder of its own dvc checks out what its targets depend on, and no stage depends on a file that it is told of
    by params.yaml.
    """
    named = [str(path) for path in named_files().values()]
    for key, _, values in (word.partition("=") for word in words):
        if key in _FILE_KEYS:
            named += [value.strip("'\" ") for value in values.split(",")]
    return sorted({f"{name}.dvc" for name in named if Path(f"{name}.dvc").is_file()})


def named_files() -> dict[str, Path]:
    """By key, the settings of params.yaml that may name a file, where they are relative paths."""
    found, params = {}, read_params()
    for key in _FILE_KEYS:
        section, name = key.split(".")
        value = (params.get(section) or {}).get(name)
        if isinstance(value, str) and not Path(value).is_absolute():
            found[key] = Path(value)
    return found


def start_workers(count: int, trust: bool = True) -> None:
    """See to it that so many daemons take tasks from the queue; they end when it has been empty for 10 seconds.

    dvc asks the daemons, which takes seconds; with `trust`, those whose process lives need not be asked.
    """
    if not trust or _num_daemons() < count:
        _dvc("queue", "start", "--jobs", str(count))


def look(name: str) -> Task:
    """The state of the experiment."""
    found = [(path, info) for path in _TASKS.glob("*/*.run") if (info := _json(path)).get("name") == name]
    if not found:
        return Task("waiting")
    path, info = max(found, key=lambda pair: pair[0].stat().st_mtime)
    process = _json(path.with_suffix(".json"))
    pid = process["pid"] if process and _is_dvc(process["pid"]) else None
    state: State = "running"
    if info["status"] == _FINISHED:
        state = "succeeded" if info["result_ref"] else "failed"
    elif info["status"] in (_FAILED, _CANCELED) or process.get("returncode"):
        state = "failed"
    elif pid is None and _is_lost(path.with_suffix(".json")):
        state = "lost"
    return Task(state, Path(info["root_dir"]), pid, path.with_suffix(".out"))


def listed() -> dict[str, str]:
    """`Queued`, `Running`, `Success` or `Failed`, by name, as `dvc queue status` has it."""
    rows = re.findall(r"^[0-9a-f]{7} +(\S+) .* (\w+) *$", _dvc("queue", "status"), flags=re.MULTILINE)
    return dict(rows)


def is_lost(name: str, listed_as: str) -> bool:
    """Whether an experiment that dvc lists so will never end.

    dvc says `Running` for ever of those that were killed with it, and of those that a daemon takes in its last moment.
    """
    if listed_as != "Running":
        return False
    state = look(name).state
    return state == "lost" or (state == "waiting" and _num_daemons() == 0)


def stop(name: str, kill: bool = False) -> bool:
    """Ask the running stage of an experiment to stop, which makes the experiment fail; whether one was there to ask.

    `kill`: do not ask.

    Not `dvc queue kill`: it interrupts the whole process group, and so ends the daemon too, which then takes no further
    task.
    """
    process = look(name).process
    try:
        children = psutil.Process(process).children(recursive=True) if process else []
        for child in children:
            child.kill() if kill else child.terminate()
    except psutil.NoSuchProcess:
        return False
    return bool(children)


def remove(names: Sequence[str]) -> None:
    """Take experiments off the queue, waiting or failed; results of those that succeeded are untouched."""
    if not names:
        return
    known, deadline = listed(), time.monotonic() + _TOLD_SECONDS
    while any(_is_being_told(name, known) for name in names) and time.monotonic() < deadline:
        time.sleep(1)
        known = listed()
    there = [name for name, state in known.items() if name in names and state in ("Queued", "Failed")]
    if there:  # dvc removes none when it misses one
        _dvc("queue", "remove", *there, check=False)


def forget(study: str) -> None:
    """Remove what dvc keeps of ended experiments that are named after a study and a number."""
    named = re.compile(rf"{re.escape(study)}-\d+")
    known = listed()
    if lost := [name for name, state in known.items() if named.fullmatch(name) and is_lost(name, state)]:
        _dvc("queue", "kill", *lost, check=False)  # so they become failed ones
        known = listed()
    if ended := [name for name, state in known.items() if named.fullmatch(name) and state in ("Success", "Failed")]:
        _dvc("queue", "remove", *ended)
        known = listed()
    for path in _TASKS.glob("*/*.run"):  # also of those that dvc, killed with them, no longer lists
        name = _json(path).get("name") or ""
        if named.fullmatch(name) and name not in known:
            shutil.rmtree(path.parent)


def clear(name: str) -> None:
    """Remove the folder that an experiment ran in, which stays behind when its dvc was killed."""
    if (folder := look(name).folder) is not None:
        shutil.rmtree(folder, ignore_errors=True)


def reason(log: Path | None) -> str:
    """Why an experiment failed: the line in which its stage says so, else dvc's last one."""
    lines = log.read_text(errors="replace").splitlines() if log is not None and log.exists() else []
    words = [line.strip() for line in lines if line.strip()]
    said = [line for line in words if re.match(r"[\w.]+: (error: )?|[\w.]*Error", line) and "error" in line.lower()]
    # dvc's own "ERROR: failed to reproduce" only says that the stage failed.
    said = [line for line in said if not line.startswith("ERROR: failed to reproduce")] or said or words
    return said[-1] if said else "it left no words; `dvc queue logs` may have some"


def experiments(pattern: str) -> dict[str, str]:
    """The commits of finished experiments, on any commit, by name; `pattern` as in git for-each-ref."""
    lines = _git("for-each-ref", "--format=%(refname) %(objectname)", f"refs/exps/*/*/{pattern}").splitlines()
    return {line.split()[0].rsplit("/", 1)[-1]: line.split()[1] for line in lines}


def file_of(commit: str, path: str) -> str:
    """A text file that git tracks, as it is in `commit`."""
    return _git("show", f"{commit}:{path}")


def number_in(text: str, key: str, where: str) -> float:
    """A number in JSON, by names with dots between them; InputError, which names `where`, when it is not there."""
    content: Any = json.loads(text)
    rest: str | None = key
    while rest is not None:
        names = content if isinstance(content, dict) else {}
        # A name may hold a dot itself: 0.10 in detection_of_contaminated.0.10.
        part = max((name for name in names if f"{rest}.".startswith(f"{name}.")), key=len, default=None)
        if part is None:
            valid = f" (valid: {', '.join(names)})" if names else ""
            raise InputError(f"{where}: no {rest.partition('.')[0]!r} in it{valid}")
        content, rest = content[part], rest[len(part) + 1 :] if len(rest) > len(part) else None
    if isinstance(content, bool) or not isinstance(content, (int, float)):
        raise InputError(f"{where}: {content!r} is no number")
    return float(content)


def _is_lost(path: Path) -> bool:
    """Whether nobody will say how a task ended that has no process (any more), whose `*.json` would be `path`.

    A daemon first makes a folder, then the process; and writes down how that ended as soon as it has seen it.
    """
    if _num_daemons() == 0:
        return True
    if not path.exists():
        return False
    time.sleep(_SEEN_SECONDS)
    return _json(path).get("returncode") is None


def _is_being_told(name: str, known: dict[str, str]) -> bool:
    """Whether a failed experiment's daemon has yet to tell dvc, which lists it as running until then."""
    return known.get(name) == "Running" and look(name).state == "failed" and _num_daemons() > 0


def _num_daemons() -> int:
    """How many daemons of this repository live."""
    here, count = Path.cwd(), 0
    for process in psutil.process_iter():
        try:
            count += "queue-worker" in process.cmdline() and Path(process.cwd()).is_relative_to(here)
        except psutil.Error:  # ended meanwhile, or not ours
            continue
    return count


def _is_dvc(pid: int) -> bool:
    """Whether a process lives and is dvc's: after a restart of the machine its number may be another's."""
    try:
        return any("dvc" in word for word in psutil.Process(pid).cmdline())
    except psutil.Error:
        return False


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # being written
        return {}
    return content if isinstance(content, dict) else {}


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)  # noqa: S603, S607
    if result.returncode:
        raise InputError(f"`git {' '.join(arguments[:2])}` failed: {result.stderr.strip()}")
    return result.stdout


def _dvc(*arguments: str, lock: int | None = None, check: bool = True) -> str:
    # Into a file: the daemons inherit what dvc writes to, and a pipe would be at its end with the last of them only.
    with tempfile.TemporaryFile("w+") as output:
        result = subprocess.run(  # noqa: S603
            [sys.executable, "-m", "dvc", *arguments],
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=() if lock is None else (lock,),
        )
        output.seek(0)
        said = output.read().strip()
    if result.returncode and check:
        raise InputError(f"`dvc {' '.join(arguments[:3])}` failed: {said}")
    return said
