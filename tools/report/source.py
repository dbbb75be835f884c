"""Where a report reads from: the workspace's files, a git revision, or a DVC experiment by its name."""

from __future__ import annotations

import difflib
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.core.errors import InputError

WORKSPACE = "workspace"
_EXPERIMENTS = "refs/exps/"
_RESULTS = ("metrics/evaluate.json", "metrics/train/metrics.json", "dvc.lock")


@dataclass(frozen=True)
class Source:
    """One state of the repository. `read` returns a file's content, or None where that state has no such file."""

    name: str  # as the user gave it
    commit: str  # of the workspace: HEAD
    subject: str
    date: str  # ISO 8601, of the commit
    experiment: str | None
    baseline: str | None  # the commit that an experiment was made from
    changed: tuple[str, ...]  # tracked files of the workspace that differ from HEAD
    read: Callable[[str], bytes | None]

    @property
    def is_workspace(self) -> bool:
        """Whether it is the files here, committed or not."""
        return self.name == WORKSPACE


def open_source(name: str) -> Source:
    """The workspace, or a revision of git or an experiment of DVC. InputError where there is no such thing."""
    if not Path(".dvc").is_dir() or not Path("dvc.yaml").is_file():
        raise InputError("no DVC repository here; run this from the root of the repository")
    if name == WORKSPACE:
        commit = _resolve_commit("HEAD") or ""
        return _source(name, commit, None, _changed_files() if commit else (), _read_file)
    experiment = baseline = None
    if not (commit := _resolve_commit(name)):
        commit, experiment, baseline = _resolve_experiment(name)
    else:
        by_commit = {commit: (label, base) for commit, label, base in _experiments()}
        experiment, baseline = by_commit.get(commit, (None, None))
    return _source(name, commit, (experiment, baseline), (), _reader(commit))


def default_baseline(source: Source) -> str | None:
    """What a state is compared with where nobody said it: None when there is nothing.

    An experiment: the commit that it was made from. The workspace: HEAD, where its results or params are others. A
    commit: the last one before it with other results.
    """
    if source.baseline:
        return source.baseline
    if not source.commit:
        return None
    compared = ("params.yaml", *_RESULTS)
    if source.is_workspace and any(path in compared for path in source.changed):
        return "HEAD"
    path = _RESULTS[0]
    present = _git("rev-parse", "--verify", "--quiet", f"{source.commit}:{path}")
    for commit in _git("rev-list", source.commit, "--", path).split():
        blob = _git("rev-parse", "--verify", "--quiet", f"{commit}:{path}")
        if blob and blob != present:
            return commit
    return None


def _source(
    name: str,
    commit: str,
    experiment: tuple[str | None, str | None] | None,
    changed: tuple[str, ...],
    read: Callable[[str], bytes | None],
) -> Source:
    subject, date = (
        _git("log", "-1", "--no-show-signature", "--format=%s%x00%cI", commit).split("\0") if commit else ("", "")
    )
    label, baseline = experiment or (None, None)
    return Source(name, commit, subject, date, label, baseline, changed, read)


# --- names --------------------------------------------------------------------------------------------------------


def _resolve_commit(name: str) -> str:
    if name.startswith("-"):
        return ""
    return _git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")


def _resolve_experiment(name: str) -> tuple[str, str, str]:
    """Commit, name and baseline of an experiment; the one made from HEAD where several have the name."""
    found = [(commit, label, baseline) for commit, label, baseline in _experiments() if label == name]
    head = _resolve_commit("HEAD")
    if of_head := [one for one in found if one[2] == head]:
        return of_head[0]
    if len(found) == 1:
        return found[0]
    if found:
        commits = ", ".join(commit[:7] for commit, _, _ in found)
        raise InputError(f"{name!r}: {len(found)} experiments have this name; say which by its commit: {commits}")
    names = ["HEAD", WORKSPACE, *(label for _, label, _ in _experiments())]
    names += _git("for-each-ref", "--format=%(refname:short)", "refs/heads", "refs/tags", "refs/remotes").split()
    close = difflib.get_close_matches(name, names, n=3)
    advice = f"did you mean {' or '.join(close)}?" if close else "`git log` and `dvc exp show` list what there is"
    raise InputError(f"{name!r}: no such git revision or experiment; {advice}")


def _experiments() -> list[tuple[str, str, str]]:
    """Commit, name and baseline of every experiment: refs/exps/<2 digits>/<38 digits>/<name>."""
    found = []
    for line in _git("for-each-ref", "--format=%(objectname) %(refname)", _EXPERIMENTS).splitlines():
        commit, reference = line.split(" ", 1)
        parts = reference.removeprefix(_EXPERIMENTS).split("/")
        if len(parts) == 3 and len(parts[0] + parts[1]) == 40:
            found.append((commit, parts[2], parts[0] + parts[1]))
    return found


def _changed_files() -> tuple[str, ...]:
    listed = _git("status", "--porcelain", "-z", "--untracked-files=no", "--no-renames").split("\0")
    return tuple(sorted(line[3:] for line in listed if line))


def _git(*arguments: str) -> str:
    """Standard output; empty where git fails, as it does without a repository or a commit."""
    result = subprocess.run(["git", *arguments], capture_output=True, encoding="utf-8", errors="replace")  # noqa: S603, S607
    return result.stdout.strip("\n") if result.returncode == 0 else ""


# --- files --------------------------------------------------------------------------------------------------------


def _read_file(path: str) -> bytes | None:
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _reader(commit: str) -> Callable[[str], bytes | None]:
    """Reads files of a commit: from git, or, what DVC tracks, from its cache here, never from a remote."""
    from dvc.api import DVCFileSystem

    files = DVCFileSystem(rev=commit)
    cache = files.repo.cache.local

    def read(path: str) -> bytes | None:
        try:
            info: dict[str, Any] = files.info(path)
        except FileNotFoundError:
            return None
        if info["type"] != "file":
            return None
        if "fs_info" in info:  # in git
            return bytes(files.cat(path))
        return _read_file(cache.oid_to_path(info["md5"])) if info.get("md5") else None

    return read
