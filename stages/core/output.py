"""Outputs appear whole or not at all: everything is written beside its place, then renamed into it.

And whoever opens one that carries a checksum can ask whether it still is what was written.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.core.errors import InputError


@contextmanager
def replace_directory(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its place when the block ends well.

    When the block raises, the new folder is removed and what was at `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = (path.with_name(f".{path.name}.{suffix}") for suffix in ("new", "old"))
    for leftover in (new, old):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        for file in new.rglob("*"):
            _flush_to_disk(file)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file through a temporary name in the same folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_bytes(content)
        _flush_to_disk(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, content: str) -> None:
    """Write a UTF-8 text file through a temporary name in the same folder."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write readable JSON; NaN and infinity, which JSON does not have, raise ValueError."""
    write_text(path, json_text(content))


def json_text(content: Any) -> str:
    """Readable JSON; NaN and infinity, which JSON does not have, raise ValueError."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def sha256_of(path: Path) -> str:
    """sha256 of a file's content, 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_unaltered(path: Path, sha256: str | None, stage: str) -> None:
    """InputError when a file is not what `stage` wrote: DVC takes an altered cache entry without a word.

    Nothing is checked with None, which is what outputs have that were written before they carried a checksum.
    """
    if sha256 is not None and (found := sha256_of(path)) != sha256:
        raise InputError(
            f"{path}: altered since {stage} wrote it (sha256 {found}, not {sha256}); `python -m tools.verify --repair` "
            f"looks for an intact copy, and runs {stage} again where there is none"
        )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise the OSError that safetensors and torch hide in an exception of their own (a full disk, above all)."""
    try:
        yield
    except Exception as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
        raise


def _flush_to_disk(file: Path) -> None:
    if file.is_file():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
