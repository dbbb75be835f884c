"""Checkpoints of a training run: what a killed run needs to go on as if nothing had happened.

They lie outside the repository, under `runtime.cache_dir`, so that `dvc exp run --temp` and queue workers find them,
and are no DVC outs (a persisted out would make a run with other params go on from the OLD model). The folder's name is
a fingerprint of everything that the result depends on: another learning rate, other images or other code start over.

    <cache_dir>/checkpoints/<fingerprint>/step-00000120-0123456789abcdef.pt    the newest two; with their SHA-256
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from stages.core.closure import code_hash
from stages.core.errors import InputError
from stages.core.output import disk_errors, sha256_of
from stages.core.runtime import make_cache_dir

_NUM_KEPT = 2  # the older one is for the case that the disk damages the newer one
_MAX_DAYS = 14  # a run that nobody has gone on with for so long is forgotten
_DIGITS = 16  # of the SHA-256 in a file's name
_LOCK_SECONDS = 30  # what a run that was just told to stop may need to write its last checkpoint


def fingerprint(module: str, facts: dict[str, Any], root: Path) -> str:
    """Hash (32 hex digits) of JSON-like facts and of the source of `module` and all of ours that it imports."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update(code_hash(root, [module]).encode())
    return digest.hexdigest()[:32]


class CheckpointStore:
    """The checkpoints of one run: one fingerprint, one folder, one process that writes."""

    def __init__(self, cache_dir: Path, key: str) -> None:
        self.folder = cache_dir / "checkpoints" / key

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; InputError when another process keeps it for half a minute.

        Forgets other runs that were left alone for two weeks.
        """
        make_cache_dir(self.folder.parent)
        try:
            with FileLock(self.folder.with_suffix(".lock"), timeout=_LOCK_SECONDS):
                _forget_old_runs(self.folder)
                yield
        except Timeout:
            raise InputError(
                "another process trains with the same params, data and code; wait for it or end it "
                f"(it holds {self.folder.with_suffix('.lock')})"
            ) from None

    def newest(self) -> dict[str, Any] | None:
        """The newest checkpoint that is whole, on the CPU, or None. A damaged one is named and passed over."""
        for path in reversed(self._paths()):
            try:
                # PyTorch does not compare the checksums of the zip that it writes.
                if sha256_of(path)[:_DIGITS] == path.stem.split("-")[2]:
                    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
                    return state
                reason = "is damaged (by its SHA-256)"
            except OSError as error:
                reason = f"cannot be read ({error.strerror or error})"
            print(f"train: {path} {reason}; the checkpoint before it is taken", flush=True)
        return None

    def newest_path(self) -> Path | None:
        """The file of the newest checkpoint."""
        return next(reversed(self._paths()), None)

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write a checkpoint that appears whole or not at all, and remove all but it and the one before.

        Those of later steps go, too: they are damaged, or the run would have gone on from there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"step-{step:08d}.new"
        try:
            with disk_errors(temporary), temporary.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            path = self.folder / f"{temporary.stem}-{sha256_of(temporary)[:_DIGITS]}.pt"
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        earlier = [other for other in self._paths() if _step(other) < step]
        for other in {*self._paths()}.difference(earlier[1 - _NUM_KEPT :], [path]):
            other.unlink()
        return path

    def remove(self) -> None:
        """Forget the run: it has ended, and its outputs are written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.pt"))


def _step(path: Path) -> int:
    return int(path.stem.split("-")[1])


def _forget_old_runs(own: Path) -> None:
    """Remove the runs beside the one of folder `own` that are old; each is held meanwhile, so no process uses it."""
    oldest = time.time() - _MAX_DAYS * 24 * 3600
    for lock in own.parent.glob("*.lock"):
        folder = lock.with_suffix("")
        if folder == own:
            continue
        with suppress(Timeout, PermissionError), FileLock(lock, timeout=0):  # in use, or another user's
            if _last_change(lock) < oldest:
                shutil.rmtree(folder, ignore_errors=True)
                lock.unlink(missing_ok=True)


def _last_change(lock: Path) -> float:
    """Newest modification time (seconds since 1970) of a run's files; other processes may remove them meanwhile."""
    files = [lock]
    with suppress(FileNotFoundError):
        files += lock.with_suffix("").iterdir()
    times = [0.0]
    for file in files:
        with suppress(FileNotFoundError):
            times.append(file.stat().st_mtime)
    return max(times)
