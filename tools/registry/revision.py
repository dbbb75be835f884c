"""Data and models of any commit, out of DVC's cache or else its remote; the workspace is not touched."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.core.errors import InputError
from tools.registry.versions import resolve
from tools.shared.commands import git

_OF_THIS_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}
CACHE = Path(".dvc/tmp/models")  # <commit>/<output>, side by side; removing it costs the next call a copy


def model_folder(name: str, path: str = "models/onnx") -> Path:
    """A local folder that holds `path` as it was at a commit, which a stage, version, experiment or revision names.

    It is fetched once and found there again in milliseconds: neither dvc nor gto is imported then. Nothing may be
    written into it. InputError when the name means nothing, the commit has no such output, or its data is nowhere.
    """
    if not Path(".git").exists():
        raise InputError(f"no git repository here to find the model {name!r} in; run this from the root of one")
    path = os.path.normpath(path)
    if path in (".", "..") or path.startswith(("../", "/")):
        raise InputError(f"--path: {path}: name a file or folder of the commit, such as models/onnx")
    commit = resolve(name)
    # One level: a path inside of an output is not taken for the output.
    folder = CACHE / commit / path.removeprefix("models/").strip("/").replace("/", "+")
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
        try:
            fetch(commit, [path], scratch, f"{name} (commit {commit[:7]})")
            _move(scratch / path, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def fetch(commit: str, paths: list[str], folder: Path, called: str | None = None) -> None:
    """Copy files and folders of a commit below `folder` and check them against their hashes.

    InputError names what is missing of the commit, which the message calls `called`.
    """
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc_data.index import DataIndexError

    called = called or f"commit {commit[:7]}"
    remote = _remote_config().get("core", {}).get("remote")
    # With the workspace's remote: the commit's own config may be older than it.
    files = DVCFileSystem(repo=str(Path.cwd()), rev=commit, remote=remote)
    for path in paths:
        if not files.exists(path):
            raise InputError(_has_no(called, path, commit))
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        try:
            is_folder = files.isdir(path)
            found = files.find(path, detail=True) if is_folder else {path: files.info(path)}
            files.get(path, str(folder / path), recursive=is_folder)
        except (DvcException, DataIndexError, OSError) as error:
            if isinstance(error, OSError) and error.errno in _OF_THIS_MACHINE:
                raise  # a full disk, say: nothing is missing
            if not any(path == output or path.startswith(f"{output}/") for output in _outputs(commit)):
                raise InputError(_has_no(called, path, commit)) from None  # in its dvc.yaml, but never made
            where = f"neither in DVC's cache nor on the remote {remote}"
            if not remote:
                where = "not in DVC's cache, and no remote is configured"
            raise InputError(
                f"{path} of {called} is {where}: `python -m tools.registry push` where it was "
                f"made, or `dvc push` of an experiment, then again ({str(error) or type(error).__name__})"
            ) from error
        for name, info in found.items():
            expected, copy = info.get("md5"), folder / name
            if expected and hashlib.md5(copy.read_bytes(), usedforsecurity=False).hexdigest() != expected:
                raise InputError(f"{name} of {called} is damaged in DVC's cache or on the remote (its hash differs)")


def push(commits: list[str]) -> tuple[int, str]:
    """Copy the data of commits to DVC's default remote; returns how many files were new there, and its name.

    InputError for files that are neither here nor there, which to DVC is a warning.

    `dvc push --all-tags` takes the remote out of each commit's own config: what was committed before the remote was
    configured, it leaves out without a word. Here it is the workspace's remote.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    config = _remote_config()
    if not config:
        raise InputError("no remote is configured: `dvc remote add --default NAME URL`, commit .dvc/config, then again")
    remote = config["core"]["remote"]
    try:
        with Repo(".", config=config) as repo, _missing_files() as missing:
            count = repo.push(revs=commits, workspace=False)
    except (DvcException, OSError) as error:
        raise InputError(f"the remote {remote} does not have everything: {error}") from error
    if missing:
        whole = {out["md5"].removesuffix(".dir"): out["path"] for commit in commits for out in _outs(commit)}
        named = sorted({whole.get(digest, f"a file of md5 {digest}") for digest in missing})
        raise InputError(
            f"the remote {remote} does not have everything, nor has DVC's cache: {', '.join(named)}; "
            "push from where it was made"
        )
    return count, remote


@contextmanager
def _missing_files() -> Iterator[set[str]]:
    """Yield the hashes (md5, 32 hex digits) of the files that dvc warns of, while it pushes, as being nowhere."""
    found: set[str] = set()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "neither locally nor on remote" in record.getMessage():
                found.update(re.findall(r"md5: ([0-9a-f]{32})", record.getMessage()))

    logger, handler = logging.getLogger("dvc_data"), Handler(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def _remote_config() -> dict[str, Any]:
    """DVC's configuration of the workspace's default remote; empty where there is none."""
    from dvc.repo import Repo

    with Repo() as repo:
        name = repo.config["core"].get("remote")
        return {"core": {"remote": name}, "remote": {name: dict(repo.config["remote"][name])}} if name else {}


def _has_no(called: str, path: str, commit: str) -> str:
    models = ", ".join(output for output in _outputs(commit) if output.startswith("models/")) or "no models"
    return f"{called} has no {path}: the pipeline did not make it then; its dvc.lock has {models}"


def _move(source: Path, target: Path) -> None:
    """Rename a folder into place; whoever was faster wins, with the same bytes."""
    try:
        os.rename(source, target)  # noqa: PTH104  # Path.rename says nothing of a target that exists
    except OSError:
        if not target.is_dir():
            raise


def _outputs(commit: str) -> list[str]:
    """The outputs that dvc.lock names at a commit."""
    return sorted(out["path"] for out in _outs(commit))


def _outs(commit: str) -> list[dict[str, Any]]:
    from ruamel.yaml import YAML

    lock = YAML(typ="safe", pure=True).load(git("show", f"{commit}:dvc.lock", check=False)) or {}
    return [out for stage in lock.get("stages", {}).values() for out in stage.get("outs", ())]
