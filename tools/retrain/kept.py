"""The files that a retraining starts from; its promotion hands them to DVC, so that push and pull carry them.

retrain/labelled-<hash>.tar, retrain/weights-<hash>.safetensors    written by a run; git ignores them
retrain/<file>.dvc                                                 in a promotion's commit: those of its params.yaml
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ruamel.yaml import YAML

from tools.shared.commands import git

FOLDER = Path("retrain")
_POINTERS = tuple(
    f":(glob){FOLDER}/{name}.dvc" for name in ("labelled-*.tar", "weights-*.safetensors")
)  # and no others


def remove_unfinished() -> None:
    """Remove what a killed run of this tool, or of dvc, was writing."""
    for pattern in (".*.new", ".*.tmp"):
        for path in FOLDER.glob(pattern):
            path.unlink(missing_ok=True)


def tree_with_pointers(commit: str, files: Sequence[Path], scratch: Path) -> str:
    """The tree of a commit with the .dvc files of `files` in place of an earlier retraining's; returns its hash.

    `dvc add` would write them into the workspace, where it would have to be undone if the promotion is broken off.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        index, written = Path(name) / "index", Path(name) / "pointer"
        git("read-tree", commit, index=index)
        git("rm", "--cached", "--force", "--quiet", "--ignore-unmatch", "--", *_POINTERS, index=index)
        for file in files:
            outs = [{"md5": _md5(file), "size": file.stat().st_size, "hash": "md5", "path": file.name}]
            with written.open("w") as stream:
                YAML().dump({"outs": outs}, stream)
            blob = git("hash-object", "-w", "--no-filters", str(written))
            git("update-index", "--add", "--cacheinfo", f"100644,{blob},{file.as_posix()}.dvc", index=index)
        return git("write-tree", index=index)


def into_cache(files: Sequence[Path]) -> None:
    """Copy files into DVC's cache; with no .dvc file that names them, `dvc gc` removes them again."""
    from dvc.repo import Repo

    with Repo() as repo:
        for file in files:
            repo.cache.local.add(str(file.absolute()), repo.fs, _md5(file))


def remove_superseded(before: str, after: str) -> None:
    """Remove the files that a commit had in DVC and its successor has not; DVC's cache keeps them."""
    names = git("diff", "--name-only", "--no-renames", "--diff-filter=D", "-z", before, after, "--", *_POINTERS)
    for name in filter(None, names.split("\0")):
        Path(name).with_suffix("").unlink(missing_ok=True)


def _md5(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "md5").hexdigest()
