"""DVC experiments as retraining needs them: run apart from the workspace, read without applying, promote or not at all.

Whatever is killed here can be done again: an experiment is named by what goes into it and is reused once it has ended;
a promotion is written down before it begins and is finished by whoever comes next.

    .dvc/tmp/retrain/lock            held by a run, and by the dvc that it started for as long as that lives
    .dvc/tmp/retrain/overrides.json  while dvc runs: for some moments it changes params.yaml in the workspace
    .dvc/tmp/retrain/promotion.json  while a promotion is under way
    .dvc/tmp/retrain/scratch/        temporary files of a run; the next one removes what a killed one left
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError

from stages.core.errors import InputError, Stopped
from stages.core.output import write_json
from tools.registry import command as registry
from tools.registry import revision
from tools.retrain import kept
from tools.shared import committed
from tools.shared.commands import dvc, environment, git
from tools.shared.overrides import flat
from tools.shared.process import signals_held

_STATE = Path(".dvc/tmp/retrain")
_OVERRIDES = _STATE / "overrides.json"
_PROMOTION = _STATE / "promotion.json"
_SCRATCH = _STATE / "scratch"
_DVCS_OWN = ".dvc/tmp/repro.dat"  # which `dvc exp run` adds to git's index for a moment

Value = str | int | float | bool | None


class ExperimentError(Exception):
    """The experiment ended without a result; the message is the reason."""


@contextmanager
def only_run() -> Iterator[int]:
    """Hold the repository for this run; waits for another one. Yields the lock's descriptor, for children to inherit.

    A dvc that outlives the tool that started it keeps the lock: nothing trains twice at once.
    """
    _STATE.mkdir(parents=True, exist_ok=True)
    with (_STATE / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("retrain: another run is under way here, or its experiment still is; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder for the run that holds the lock; its name is new, because a killed run's monitor may live on."""
    shutil.rmtree(_SCRATCH, ignore_errors=True)
    kept.remove_unfinished()
    _SCRATCH.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_SCRATCH) as folder:
        yield Path(folder).absolute()


# --- the state of the repository ----------------------------------------------------------------------------------


def check_repository() -> str:
    """The commit that HEAD is at. InputError when the workspace is not what it says, or git could not commit."""
    head = committed.check_repository()
    _take_back_overrides()
    committed.check_files()
    committed.check_results()
    return head


def _take_back_overrides() -> None:
    """Restore params.yaml where a killed dvc left it with the overrides of the experiment that it was preparing."""
    if not _OVERRIDES.exists():
        return
    overrides: dict[str, Value] = json.loads(_OVERRIDES.read_text())
    changed = set(committed.changed_files())
    if changed and changed <= {"params.yaml", "dvc.lock", _DVCS_OWN}:
        yaml = YAML(typ="safe", pure=True)
        expected = yaml.load(git("show", "HEAD:params.yaml"))
        for key, value in overrides.items():
            section, name = key.split(".")
            expected[section][name] = value
        found = yaml.load(Path("params.yaml").read_text())
        if found == expected if "params.yaml" in changed else _DVCS_OWN in changed:  # dvc.lock alone is somebody's own
            git("reset", "--quiet")
            git("checkout", "HEAD", "--", "params.yaml", "dvc.lock")
    _OVERRIDES.unlink()


# --- an experiment ------------------------------------------------------------------------------------------------


def experiment_name(head: str, overrides: Mapping[str, Value]) -> str:
    """A name that says what goes in: the commit (code, params, data) and what is changed of it."""
    digest = hashlib.sha256(json.dumps([head, dict(overrides)], sort_keys=True).encode())
    return f"retrain-{digest.hexdigest()[:12]}"


def run_experiment(name: str, head: str, overrides: Mapping[str, Value], lock: int, needed: Sequence[Path] = ()) -> str:
    """Run the pipeline with changed params in a folder of dvc's, which gets the files `needed`; returns its commit.

    One that has ended is reused; one that was killed goes on from its checkpoint. Raises ExperimentError when a stage
    fails, Stopped when dvc was killed. Where only this process is told to stop, dvc goes on and keeps the lock.
    """
    reference = f"refs/exps/{head[:2]}/{head[2:]}/{name}"
    if commit := git("rev-parse", "--verify", "--quiet", reference, check=False):
        print(f"retrain: experiment {name} has ended before; it is taken as it is", flush=True)
        return commit
    _remove_leftovers(overrides)
    write_json(_OVERRIDES, dict(overrides))
    settings = [word for key, value in overrides.items() for word in ("-S", f"{key}={_quoted(value)}")]
    copied = [word for path in needed for word in ("--copy-paths", str(path))]
    command = [sys.executable, "-m", "dvc", "exp", "run", "--temp", "--name", name, *copied, *settings]
    process: subprocess.Popen[bytes] | None = None
    try:
        with signals_held():
            process = subprocess.Popen(command, env=environment(), pass_fds=(lock,), stdin=subprocess.DEVNULL)  # noqa: S603
        status = process.wait()
    except KeyboardInterrupt:
        if process is not None and process.poll() is None:
            print(f"retrain: dvc is still at work on {name}; the same command waits for it", flush=True)
        raise
    _take_back_overrides()
    if status < 0:
        raise Stopped(f"dvc was ended by signal {-status}; run the same command again, and it goes on", -status)
    commit = git("rev-parse", "--verify", "--quiet", reference, check=False)
    if status or not commit:
        raise ExperimentError(f"experiment {name} failed (dvc's exit status is {status}; its words are above)")
    return commit


def _remove_leftovers(overrides: Mapping[str, Value]) -> None:
    """Remove the folders of runs of this experiment that were killed: dvc leaves them, with copies of all images."""
    for path in Path(".dvc/tmp/exps/standalone").glob("tmp*/params.yaml"):
        try:
            params = flat(YAML(typ="safe", pure=True).load(path.read_text()) or {})
        except (InputError, OSError, UnicodeDecodeError, YAMLError):  # being written, or left so by a killed dvc
            continue
        if overrides.items() <= params.items():
            shutil.rmtree(path.parent, ignore_errors=True)


def fetch(commit: str, paths: list[str], folder: Path) -> None:
    """Copy files and folders of an experiment below `folder`; the workspace is not touched."""
    try:
        revision.fetch(commit, paths, folder, "the experiment")
    except InputError as error:
        raise ExperimentError(str(error)) from error


def params_when(accepts: Callable[[dict[str, Any]], bool], head: str) -> dict[str, Any] | None:
    """The newest params.yaml, from the commit `head` back, that `accepts` is true of; None where there is none."""
    for commit in git("rev-list", head, "--", "params.yaml").split():
        params: dict[str, Any] = YAML(typ="safe", pure=True).load(git("show", f"{commit}:params.yaml"))
        if accepts(params):
            return params
    return None


def _quoted(value: Value) -> str:
    """A value as the grammar of `dvc exp run -S` (Hydra's) wants it."""
    if isinstance(value, str):
        return "'" + value.replace("'", "\\'") + "'"
    return json.dumps(value)


# --- promotion ----------------------------------------------------------------------------------------------------


def promote(
    head: str, experiment: str, message: str, facts: dict[str, Any], needed: Sequence[Path] = ()
) -> dict[str, Any]:
    """Make the experiment the state of the branch: commit, data and models, tag. Returns `facts` with these named.

    The commit is made of the experiment's own tree, so that it holds exactly what was evaluated, and of .dvc files for
    what was `needed`. Call `forget_promotion` when the result is reported. Raises ExperimentError when somebody worked
    here meanwhile.
    """
    moved, changed = git("rev-parse", "HEAD") != head, committed.changed_files()
    if moved or changed:
        what = "HEAD moved" if moved else f"{', '.join(changed[:5])} changed"
        raise ExperimentError(f"{what} while the experiment ran; commit or undo that, and run the same command again")
    if altered := kept.altered(needed):
        raise ExperimentError(f"{', '.join(altered)} changed while the experiment ran; run the same command again")
    _SCRATCH.mkdir(parents=True, exist_ok=True)
    tree = kept.tree_with_pointers(experiment, kept.into_cache(needed), _SCRATCH)
    added = git("diff", "--name-only", "--no-renames", "--diff-filter=A", "-z", head, tree, strip=False)
    if in_the_way := [name for name in added.split("\0") if name and Path(name).exists()]:
        raise ExperimentError(
            f"{', '.join(in_the_way[:5])}: not tracked by git, and in the way; move it and run this again"
        )
    commit = git("commit-tree", tree, "-p", head, "-m", message)
    write_json(_PROMOTION, {"head": head, "commit": commit, "facts": facts})
    finished = finish_promotion()
    assert finished is not None
    return finished


def finish_promotion() -> dict[str, Any] | None:
    """Do what is left of a promotion, whatever it was killed at; None when there is none, or HEAD is elsewhere."""
    if not _PROMOTION.exists():
        return None
    written = json.loads(_PROMOTION.read_text())
    before, commit = written["head"], written["commit"]
    facts: dict[str, Any] = written["facts"]
    head = git("rev-parse", "HEAD")
    if head == before:
        _restore_half_written(before, commit)
        git("merge", "--ff-only", "--no-verify-signatures", "--quiet", commit)
    elif head != commit:
        print(
            f"retrain: HEAD has moved since the promotion of {facts['experiment']} was broken off; if its commit is "
            "still what you want: dvc checkout && make register",
            flush=True,
        )
        forget_promotion()
        return None
    dvc("checkout", "--force", "--quiet")
    kept.remove_superseded(before, commit)
    return facts | {"commit": commit, "tag": registry.register_commit(commit).tag}


def forget_promotion() -> None:
    """The promotion is complete and reported."""
    _PROMOTION.unlink(missing_ok=True)


def _restore_half_written(before: str, after: str) -> None:
    """Bring back files that a killed git left between two commits; InputError for one that somebody changed."""
    names = git("diff", "--name-only", "--no-renames", "-z", before, after, strip=False).split("\0")
    for name in filter(None, names):
        old, new = (_content(commit, name) for commit in (before, after))
        found = Path(name).read_bytes() if Path(name).is_file() else None
        if found is not None and not any(side is not None and side.startswith(found) for side in (old, new)):
            raise InputError(f"{name} was changed during a promotion; restore it (git checkout -- {name})")
        if old is None:
            Path(name).unlink(missing_ok=True)
        elif found != old:
            git("checkout", before, "--", name)
    git("reset", "--quiet")


def _content(commit: str, name: str) -> bytes | None:
    command = ["git", "cat-file", "blob", f"{commit}:{name}"]
    result = subprocess.run(command, capture_output=True)  # noqa: S603
    return result.stdout if result.returncode == 0 else None
