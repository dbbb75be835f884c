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

from tools.shared.commands import dvc, git

FOLDER = Path("retrain")


def tree_with_pointers(commit: str, files: Sequence[Path], scratch: Path) -> str:
    """The tree of a commit with the .dvc files of `files` in place of all that are in it; returns its hash."""
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        index, written = Path(name) / "index", Path(name) / "pointer"
        git("read-tree", commit, index=index)
        git("rm", "--cached", "--quiet", "--ignore-unmatch", "--", f"{FOLDER}/*.dvc", index=index)
        for file in files:
            with written.open("w") as stream:
                YAML().dump(_pointer(file), stream)
            blob = git("hash-object", "-w", "--no-filters", str(written))
            git("update-index", "--add", "--cacheinfo", f"100644,{blob},{file.as_posix()}.dvc", index=index)
        return git("write-tree", index=index)


def _pointer(file: Path) -> dict[str, object]:
    """What `dvc add` writes; it would have to be undone where a promotion does not come to its end."""
    with file.open("rb") as stream:
        md5 = hashlib.file_digest(stream, "md5").hexdigest()
    return {"outs": [{"md5": md5, "size": file.stat().st_size, "hash": "md5", "path": file.name}]}


def into_cache() -> None:
    """Copy the files that HEAD's .dvc files name into DVC's cache, where they are not yet."""
    for pointer in _pointers("ls-files", "-z"):
        if pointer.with_suffix("").exists():
            dvc("commit", "--force", "--quiet", str(pointer))


def remove_superseded(before: str, after: str) -> None:
    """Remove the files that a commit had in DVC and its successor has not; DVC's cache keeps them."""
    for pointer in _pointers("diff", "--name-only", "--no-renames", "--diff-filter=D", "-z", before, after):
        pointer.with_suffix("").unlink(missing_ok=True)


def _pointers(*command: str) -> list[Path]:
    names = git(*command, "--", f"{FOLDER}/*.dvc", strip=False).split("\0")
    return [Path(name) for name in names if name]
