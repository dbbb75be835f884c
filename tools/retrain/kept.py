"""The files that a retraining starts from; its promotion hands them to DVC, so that push and pull carry them.

retrain/labelled-<hash>.tar, retrain/weights-<hash>.safetensors    written by a run; git ignores them
retrain/<file>.dvc                                                 in a promotion's commit: those of its params.yaml
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ruamel.yaml import YAML

from stages.core.download import file_hash
from tools.shared.commands import git

FOLDER = Path("retrain")
_HASH = "[0-9a-f]" * 16
_NAMES = (f"labelled-{_HASH}.tar", f"weights-{_HASH}.safetensors")  # of the sha256
_POINTERS = tuple(f":(glob){FOLDER}/{name}.dvc" for name in _NAMES)  # somebody's own .dvc files are left alone


def remove_unfinished() -> None:
    """Remove what a killed run of this tool, or of dvc, was writing."""
    for pattern in (".*.new", ".*.tmp"):
        for path in FOLDER.glob(pattern):
            path.unlink(missing_ok=True)


def altered(files: Sequence[Path]) -> list[str]:
    """Those that are gone, or not what their name says any more."""
    return [str(file) for file in files if not file.is_file() or file_hash(file, "sha256")[:16] not in file.name]


def tree_with_pointers(commit: str, files: Mapping[Path, str], scratch: Path) -> str:
    """The tree of a commit with .dvc files for `files` (and md5) in place of an earlier retraining's; returns its hash.

    `dvc add` would write them into the workspace, where it would have to be undone if the promotion is broken off.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        index, written = Path(name) / "index", Path(name) / "pointer"
        git("read-tree", commit, index=index)
        git("rm", "--cached", "--force", "--quiet", "--ignore-unmatch", "--", *_POINTERS, index=index)
        for file, md5 in files.items():
            outs = [{"md5": md5, "size": file.stat().st_size, "hash": "md5", "path": file.name}]
            with written.open("w") as stream:
                YAML().dump({"outs": outs}, stream)
            blob = git("hash-object", "-w", "--no-filters", str(written))
            git("update-index", "--add", "--cacheinfo", f"100644,{blob},{file.as_posix()}.dvc", index=index)
        return git("write-tree", index=index)


def into_cache(files: Sequence[Path]) -> dict[Path, str]:
    """Copy files into DVC's cache; returns their md5. Where no .dvc file names them, `dvc gc` removes them again."""
    from dvc.repo import Repo

    found = {file: file_hash(file, "md5") for file in files}
    with Repo() as repo:
        for file, md5 in found.items():
            repo.cache.local.add(str(file.absolute()), repo.fs, md5)
    return found


def remove_superseded(before: str, after: str) -> None:
    """Remove the files that a commit had in DVC and its successor has not; DVC's cache keeps them."""
    names = git("diff", "--name-only", "--no-renames", "--diff-filter=D", "-z", before, after, "--", *_POINTERS)
    for name in filter(None, names.split("\0")):
        Path(name).with_suffix("").unlink(missing_ok=True)
