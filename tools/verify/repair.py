"""Mend outputs that are not as dvc.lock says, from the nearest place that has the right bytes.

In this order: DVC's cache for the workspace, an intact file of the workspace for the cache, the remote, git (for what
git keeps), and at last the stage that makes the output, run again. Nothing is taken without its hash being checked. A
file of the workspace that is replaced or removed is first copied to .dvc/tmp/set-aside/TIME/, and that is said.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.core.errors import InputError
from stages.core.output import write_bytes
from tools.doctor import storage
from tools.doctor.finding import some
from tools.remote.patient_dvc import timeouts
from tools.shared.commands import environment
from tools.verify.integrity import CACHE, LISTING, WORKSPACE, Problem, State, folder_tree, inspect, ordered_stages

_PATIENCE = 20.0  # seconds without a byte from the remote, which its client may ask several times
_SET_ASIDE = Path(".dvc/tmp/set-aside")


def repair(states: Sequence[State]) -> None:
    """Mend what has problems, each output after those that its stage reads, and say what was done.

    What cannot be mended is said too, and stays as it is. InputError when the remote does not answer: running stages
    again because a network is down is for the user to decide.
    """
    aside = _SET_ASIDE / time.strftime("%Y%m%d-%H%M%S")
    broken: set[str] = set()
    for stage in dict.fromkeys(state.stage for state in states):
        wrong = [state for state in states if state.stage == stage and state.problems]
        for state in wrong:
            _keep(state, aside)
        if lacking := [state for state in wrong if not _from_copies(state)]:
            paths = [state.path for state in lacking]
            if reason := _run_again(stage, broken, aside):
                _say(f"{some(paths)} cannot be mended: {reason}")
                broken |= set(paths)


def _from_copies(state: State) -> bool:
    """Mend an output from what has the right bytes; False when nothing has."""
    if state.kept_by == "git":
        return _from_git(state)
    from dvc.repo import Repo

    with Repo() as repo:
        out = _find(repo, state)
        if state.found(CACHE) and not _mend_cache(repo, out, state):
            return False
    if state.found(WORKSPACE):
        _check_out(state)
    return True


def _mend_cache(repo: Any, out: Any, state: State) -> bool:
    """Bring what the cache lacks of an output from the workspace or the remote; False when neither has all of it."""
    lacking = {problem.digest for problem in state.found(CACHE)}
    for digest in sorted(lacking):
        path = Path(out.cache.oid_to_path(digest))
        if path.exists() and _hash(path, out.hash_name) == digest.removesuffix(".dir"):
            lacking.discard(digest)  # another output has the same file, and it was mended there
        else:
            path.unlink(missing_ok=True)  # dvc believes a file that is there
    intact = {problem.file for problem in state.found(WORKSPACE)}
    for name, digest in state.expected.items():
        if digest in lacking and name not in intact:
            path = out.fs.join(out.fs_path, *name.split("/")) if name else out.fs_path
            out.cache.add(path, out.fs, digest)
            lacking.discard(digest)
            _say(f"{_file(state, name)}: the cache has it again, from the workspace")
    if state.is_folder and state.digest in lacking and state.expected:
        tree = folder_tree(state.expected)
        out.cache.add(tree.path, tree.fs, tree.oid)
        lacking.discard(state.digest)
        _say(f"{state.path}: the cache has the list of its files again, from the workspace")
    if lacking and out.can_push and repo.config["core"].get("remote"):
        lacking = _fetch(repo, out, state, lacking)
        if state.digest not in lacking and state.is_folder and not state.expected:
            (now,) = inspect(repo, [state.path])  # the list of its files is known now
            state.expected, state.problems = now.expected, now.problems
            return not now.found(CACHE) or _mend_cache(repo, out, now)
    return not lacking


def _fetch(repo: Any, out: Any, state: State, digests: set[str]) -> set[str]:
    """Copy files of the cache from the remote; those that it lacks, or has damaged too, are returned."""
    name = repo.config["core"]["remote"]
    lacking = set(digests)
    url = repo.config["remote"].get(name, {}).get("url", "")
    if (answer := storage.remote()).status == "FAIL":
        raise InputError(f"{state.path}: {answer.says}; {_again(state)}")
    try:
        with timeouts(_PATIENCE, drive=url.startswith("gdrive://")):
            remote = repo.cloud.get_remote_odb(name, hash_name=out.hash_name)
            if remote.fs.protocol == "local" and not Path(remote.path).parents[1].is_dir():
                raise FileNotFoundError(f"there is no folder {url}: a disk that is not mounted?")
            for digest in sorted(digests):
                if not remote.exists(digest):
                    continue
                out.cache.add(remote.oid_to_path(digest), remote.fs, digest, verify=False)
                path = Path(out.cache.oid_to_path(digest))
                if _hash(path, out.hash_name) == digest.removesuffix(".dir"):
                    lacking.discard(digest)
                else:
                    path.unlink()
                    _say(f"{state.path}: the remote {name} has {digest} damaged, too")
    except Exception as error:  # whatever the libraries of some cloud raise
        raise InputError(
            f"{state.path}: the remote {name} does not give it ({' '.join(str(error).split())[:200]}); {_again(state)}"
        ) from error
    if fetched := len(digests - lacking):
        _say(f"{state.path}: {fetched} files fetched into the cache, from the remote {name}")
    return lacking


def _again(state: State) -> str:
    return f"try again when it does, or make it anew: dvc repro --force --single-item {state.stage}"


def _check_out(state: State) -> None:
    """Put an output into the workspace out of an intact cache. What differs goes first: dvc may not see it."""
    from dvc.repo import Repo

    for problem in state.found(WORKSPACE):
        if problem.what == "unknown":
            shutil.rmtree(state.path)
        elif problem.what != "missing":
            _path(state, problem).unlink()
    with Repo() as repo:
        repo.checkout(targets=[state.path], force=True)
    _say(f"{state.path}: checked out from the cache")


def _from_git(state: State) -> bool:
    """Take a file that git keeps out of the index or the last commit, whichever has the right bytes."""
    for revision in ("", "HEAD"):
        command = ["git", "show", f"{revision}:./{state.path}"]
        found = subprocess.run(command, capture_output=True)  # noqa: S603
        if found.returncode == 0 and hashlib.md5(found.stdout, usedforsecurity=False).hexdigest() == state.digest:
            write_bytes(Path(state.path), found.stdout)
            _say(f"{state.path}: taken from git")
            return True
    return False


def _run_again(stage: str, broken: set[str], aside: Path) -> str:
    """Run a stage that makes lost outputs; returns why not, or why that did not help."""
    from dvc.repo import Repo

    with Repo() as repo:
        found = next(one for one in ordered_stages(repo) if one.addressing == stage)
        before = {str(out): out.hash_info.value for out in found.outs}
        if found.cmd is None:
            return f"nothing makes them again; `dvc pull {found.relpath}` where a remote has them, or add them again"
        if inputs := [str(dep) for dep in found.deps if str(dep) in broken]:
            return f"{stage} would read {some(inputs)}"
        changes = [change for change in repo.status(targets=[stage]).get(stage, []) if "changed outs" not in change]
        if changes:
            return (
                f"{stage} would make something else, because its code, params or data are not those of dvc.lock: "
                "`dvc repro` if that is what you want, or `git stash` first"
            )
        for state in inspect(repo, list(before)):  # the stage overwrites them all
            _keep(state, aside)
    _say(f"no copy is left: {stage} runs again")
    command = [sys.executable, "-m", "dvc", "repro", "--force", "--single-item", stage]
    if subprocess.run(command, env=environment(), stdout=2).returncode:  # noqa: S603  # stdout is for the result
        return f"{stage} failed; see above"
    with Repo() as repo:
        after = {str(out): out.hash_info.value for out in repo.index.outs}
        again = [state for state in inspect(repo, list(before)) if state.problems]
    if other := [path for path, digest in before.items() if after.get(path) != digest]:
        _say(f"{some(other)}: other bytes than before (another kind of machine?); dvc.lock has them: git diff dvc.lock")
    for state in again:  # files of the cache whose names nobody knew; dvc left them as they were
        _from_copies(state)
    return ""


def _keep(state: State, aside: Path) -> None:
    """Copy what somebody may have made by hand, before it is replaced."""
    for problem in state.found(WORKSPACE):
        source = _path(state, problem)
        if problem.what == "missing" or (aside / source).exists():
            continue
        (aside / source).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, aside / source)
        else:
            shutil.copy2(source, aside / source)
        _say(f"{source}: the {problem.what if problem.what == 'extra' else 'altered'} file is kept as {aside / source}")


def _find(repo: Any, state: State) -> Any:
    return next(out for out in repo.index.outs if str(out) == state.path)


def _path(state: State, problem: Problem) -> Path:
    return Path(_file(state, problem.file))


def _file(state: State, name: str) -> str:
    return f"{state.path}/{name}" if name != LISTING else state.path


def _hash(path: Path, name: str) -> str:
    from dvc_data.hashfile.hash import file_md5

    digest: str = file_md5(str(path), name=name)
    return digest


def _say(what: str) -> None:
    print(f"repair: {what}", file=sys.stderr, flush=True)
