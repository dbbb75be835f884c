"""Data and models of any commit, out of DVC's cache or else its remote; the workspace is not touched."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from stages.core.errors import InputError
from tools.commands import git
from tools.versions import resolve

_CACHE = Path(".dvc/tmp/models")  # <commit>/<folder>; removing it costs the next call a copy


def model_folder(name: str, path: str = "models/onnx") -> Path:
    """A local folder that holds `path` as it was at a commit, which a stage, version, experiment or revision names.

    It is fetched once and found there again in milliseconds: neither dvc nor gto is imported then. Nothing may be
    written into it. InputError when the name means nothing, the commit has no such output, or its data is nowhere.
    """
    if not Path(".git").exists():
        raise InputError(f"no git repository here to find the model {name!r} in; run this from the root of one")
    commit = resolve(name)
    folder = _CACHE / commit / path.removeprefix("models/")
    if not folder.is_dir():
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
    from dvc.repo import Repo
    from dvc_data.index import DataIndexError

    called = called or f"commit {commit[:7]}"
    with Repo() as repo:
        remote = repo.config["core"].get("remote")
    # The commit's own config may be older than the remote.
    files = DVCFileSystem(repo=str(Path.cwd()), rev=commit, remote=remote)
    for path in paths:
        if not files.exists(path):
            models = ", ".join(_outputs(commit)) or "none"
            raise InputError(f"{called} has no {path}: its dvc.lock does not name it (it names {models})")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        try:
            is_folder = files.isdir(path)
            found = files.find(path, detail=True) if is_folder else {path: files.info(path)}
            files.get(path, str(folder / path), recursive=is_folder)
        except (DvcException, DataIndexError, OSError) as error:
            where = f"nor on the remote {remote}" if remote else "and no remote is configured"
            raise InputError(
                f"{path} of {called} is neither in DVC's cache {where}: `dvc push --all-tags` where it was made, "
                f"then try again ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
            ) from error
        for name, info in found.items():
            expected, copy = info.get("md5"), folder / name
            if expected and hashlib.md5(copy.read_bytes(), usedforsecurity=False).hexdigest() != expected:
                raise InputError(f"{name} of {called} is damaged in DVC's cache or on the remote (its hash differs)")


def _move(source: Path, target: Path) -> None:
    """Rename a folder into place; whoever was faster wins, with the same bytes."""
    try:
        os.rename(source, target)  # noqa: PTH104  # Path.rename says nothing of a target that exists
    except OSError:
        if not target.is_dir():
            raise


def _outputs(commit: str) -> list[str]:
    """The models that dvc.lock names at a commit."""
    from ruamel.yaml import YAML

    lock = YAML(typ="safe", pure=True).load(git("show", f"{commit}:dvc.lock", check=False)) or {}
    outputs = [out["path"] for stage in lock.get("stages", {}).values() for out in stage.get("outs", ())]
    return sorted(path for path in outputs if path.startswith("models/"))
