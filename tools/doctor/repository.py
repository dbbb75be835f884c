"""Is this a git and DVC repository in which experiments can be made, and is its record up to date?"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

from tools.doctor.finding import Finding, fail, ok, some, warn
from tools.shared.commands import git as _git

_SECRETS = (".env", ".secrets")


def git() -> Finding:
    """A repository with a commit, and a name to commit experiments under."""
    if shutil.which("git") is None:
        return fail("git is not installed", "sudo apt-get install git (macOS: xcode-select --install)")
    if not Path(".git").exists():
        return fail("this is no git repository: a download of files has no history", "git clone it instead")
    if not Path(".dvc/config").exists():
        return fail(".dvc/config is missing", "git checkout .dvc/config")
    if not _git("rev-parse", "--git-dir", check=False):  # there, but git refuses it: it belongs to another user, say
        return fail(
            "git refuses this repository: see `git status`", f"git config --global --add safe.directory {Path.cwd()}"
        )
    commit = _git("rev-parse", "--short", "--verify", "--quiet", "HEAD", check=False)
    if not commit:
        return fail(
            "there is no commit yet, and experiments start from one", "git add -A && git commit -m 'First commit'"
        )
    if not _git("var", "GIT_COMMITTER_IDENT", check=False):
        return fail(
            "git does not know your name, and experiments are commits",
            "git config --global user.name 'Your Name' && git config --global user.email you@example.com",
        )
    return ok(f"commit {commit}{_branch()}")


def history() -> Finding:
    """A shallow clone breaks what compares or shares commits."""
    if _git("rev-parse", "--is-shallow-repository") == "true":
        return warn(
            "this clone is shallow: `dvc exp push` and comparisons with older commits fail", "git fetch --unshallow"
        )
    return ok(f"{_git('rev-list', '--count', 'HEAD')} commits, whole")


def secrets() -> Finding:
    """Keys in commits are published with them."""
    if tracked := _git("ls-files", "--", *_SECRETS).splitlines():
        return fail(
            f"git tracks {some(tracked)}, and whoever gets a commit gets the key: replace the key where it was made",
            f"git rm -r --cached {' '.join(name for name in _SECRETS if _git('ls-files', '--', name))}",
        )
    unprotected = [
        name for name in _SECRETS if Path(name).exists() and not _git("check-ignore", "--", name, check=False)
    ]
    if unprotected:
        return fail(
            f"git does not ignore {some(unprotected)}: the next `git add` publishes the key",
            f"echo {unprotected[0]} >> .gitignore",
        )
    return ok("no key is tracked by git")


def params() -> Finding:
    """Every key of params.yaml, checked as the stages will."""
    from stages.core.params import read_params
    from tools.shared.overrides import check

    sections = read_params()
    check(sections, "params.yaml")
    return ok(f"{sum(len(section) for section in sections.values())} keys of params.yaml are valid")


def untracked() -> Finding:
    """Experiments in a folder of their own see what git tracks, and nothing else."""
    from tools.shared.dvc_queue import named_files

    named = named_files().items()
    if names := [(key, path) for key, path in named if path.exists() and not Path(f"{path}.dvc").exists()]:
        key, path = names[0]
        return warn(
            f"{', '.join(key for key, _ in names)} of params.yaml: a relative path, which `dvc exp run --temp` and the "
            "queue do not find",
            f"dvc exp run -S {key}={path.absolute()}",
        )
    if files := _untracked_files():
        return warn(
            f"git does not track {some(files)}: `dvc exp run --temp` and the queue run without",
            f"git add {shlex.join(files[:3])}",
        )
    return ok("every file that is not ignored is tracked")


def stale() -> Finding:
    """dvc.lock against the workspace: what `dvc repro` would run."""
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            stages = [stage.addressing for stage in repo.index.stages]
            outputs = {str(out) for out in repo.index.outs}
            changes: dict[str, list[Any]] = repo.status()
    except LockError as error:
        return warn(f"dvc is at work, look again when it has ended: {' '.join(str(error).split())}", "make doctor")
    except DvcException as error:
        return fail(f"dvc cannot read the pipeline: {' '.join(str(error).split())}", "git diff dvc.yaml dvc.lock")
    if not Path("dvc.lock").exists():
        return warn("the pipeline has not run yet: there is no dvc.lock", "dvc repro")
    kinds = {stage: _kinds(found, outputs) for stage, found in changes.items()}
    if others := [stage for stage in stages if kinds.get(stage, set()) - {"deleted", "not in cache"}]:
        return warn(f"out of date: {_reasons(changes, others)}", "dvc repro")
    if absent := [stage for stage in stages if "not in cache" in kinds.get(stage, set())]:
        gone = [stage for stage in absent if stage.endswith(".dvc") and not Path(stage).with_suffix("").exists()]
        fix = "make pull" if gone else "dvc pull || dvc repro"  # nothing makes them; one that is here is taken by repro
        return warn(f"outputs of {some(absent)} are not in DVC's cache", fix)
    if absent := [stage for stage in stages if stage in kinds]:
        return warn(f"outputs of {some(absent)} are in DVC's cache, but not here", "dvc checkout")
    return ok(f"{sum(not stage.endswith('.dvc') for stage in stages)} stages up to date")


def _kinds(changes: list[Any], outputs: set[str]) -> set[str]:
    """What happened to the outputs that a stage writes or reads, and `other` where anything else has changed."""
    kinds: set[str] = set()
    for change in changes:
        found = next(iter(change.values())) if isinstance(change, dict) else {}
        ours = isinstance(found, dict) and set(found) <= outputs
        kinds |= {str(how) for how in found.values()} if found and ours else {"other"}
    return kinds


def _reasons(changes: dict[str, list[Any]], stages: list[str]) -> str:
    """The stages, and what changed of the first: {"changed deps": {"params.yaml": {"train.lr": "modified"}}}, say."""
    first: list[str] = []
    for change in changes[stages[0]]:
        for found in change.values() if isinstance(change, dict) else [{str(change): ""}]:
            for name, how in found.items() if isinstance(found, dict) else [(str(found), "")]:
                each = how if isinstance(how, dict) else {name: how}
                first += [f"{what} {path}".strip() for path, what in each.items()]
    return f"{some(stages)} ({stages[0]}: {some(first)})"


def _untracked_files() -> list[str]:
    """What git would add; files that experiments are made of first."""
    names = _git("ls-files", "--others", "--exclude-standard", "-z", strip=False).split("\0")
    code = ("stages/", "dvc.yaml", "params.yaml", "dvc.lock")
    return sorted(filter(None, names), key=lambda name: (not name.startswith(code), name))


def _branch() -> str:
    branch = _git("symbolic-ref", "--short", "--quiet", "HEAD", check=False)
    return f" on {branch}" if branch else " (no branch)"
