"""The store of checkpoints forgets old runs, but never its own and none that is in use."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from stages.core import checkpoint
from stages.core.checkpoint import CheckpointStore
from stages.core.output import sha256_of


def make_run(cache: Path, key: str) -> CheckpointStore:
    """A run with one checkpoint."""
    store = CheckpointStore(cache, key)
    with store.locked():
        store.save(7, {"step": 7})
    return store


def lock_of(store: CheckpointStore) -> Path:
    return store.folder.with_suffix(".lock")


def age(*stores: CheckpointStore, days: float = 15) -> None:
    """Make all files of runs look as old as that."""
    then = time.time() - days * 24 * 3600
    for store in stores:
        for path in (lock_of(store), store.folder, *store.folder.iterdir()):
            os.utime(path, (then, then))


def test_a_run_that_is_gone_on_with_after_two_weeks_finds_its_checkpoints(tmp_path: Path) -> None:
    store = make_run(tmp_path, "own")
    age(store)
    with store.locked():
        assert lock_of(store).exists(), "a second process would take the lock anew"
        assert store.newest() == {"step": 7}


@pytest.mark.parametrize(("days", "is_there"), [(15, False), (13, True)])
def test_another_run_is_forgotten_after_two_weeks(days: float, is_there: bool, tmp_path: Path) -> None:
    store, other = make_run(tmp_path, "own"), make_run(tmp_path, "other")
    age(other, days=days)
    with store.locked():
        assert other.folder.exists() == lock_of(other).exists() == is_there
    assert store.newest() is not None


def test_no_changed_bit_is_taken_for_a_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store = CheckpointStore(tmp_path, "own")
    weights = torch.arange(50, dtype=torch.float64)
    store.save(1, {"step": 1})
    whole = store.save(2, {"step": 2, "weights": weights}).read_bytes()
    newest = store.newest_path()
    assert newest is not None
    for position in range(0, len(whole), 50):
        damaged = bytearray(whole)
        damaged[position] ^= 16
        newest.write_bytes(damaged)
        assert store.newest() == {"step": 1}
        assert f"{newest} is damaged (by its SHA-256)" in capfd.readouterr().out
    newest.write_bytes(whole)
    found = store.newest()
    assert found is not None
    assert torch.equal(found["weights"], weights)


def test_a_checkpoint_that_the_disk_refuses_is_passed_over(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, "own")
    store.save(1, {"step": 1})
    bad = store.save(2, {"step": 2})

    def read(path: Path) -> str:
        if path == bad:
            raise OSError(errno.EIO, "Input/output error")
        return sha256_of(path)

    monkeypatch.setattr(checkpoint, "sha256_of", read)
    assert store.newest() == {"step": 1}
    assert f"{bad} cannot be read (Input/output error); the checkpoint before" in capfd.readouterr().out


def test_damaged_checkpoints_do_not_outlive_new_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, "own")
    for step in (100, 120):
        store.save(step, {"step": step}).write_bytes(b"damaged")
    assert store.newest() is None
    for step in (10, 20, 30):
        assert store.save(step, {"step": step}).exists()
        assert store.newest() == {"step": step}
        assert store.newest_path() == next(store.folder.glob(f"step-{step:08d}-*.pt"))
    store.save(30, {"step": 30, "again": True})
    assert store.newest() == {"step": 30, "again": True}
    assert sorted(path.name.split("-")[1] for path in store.folder.iterdir()) == ["00000020", "00000030"]


def test_another_run_that_is_in_use_is_left_alone(tmp_path: Path) -> None:
    store, other = make_run(tmp_path, "own"), make_run(tmp_path, "other")
    age(other)
    with FileLock(lock_of(other)), store.locked():
        assert lock_of(other).exists()
        assert other.newest() == {"step": 7}
    with store.locked():
        assert not other.folder.exists(), "in use no longer"


def test_a_file_that_vanishes_meanwhile_is_no_error(tmp_path: Path) -> None:
    """Listed but not there: what a checkpoint looks like that the run's own process has just removed."""
    store, other = make_run(tmp_path, "own"), make_run(tmp_path, "other")
    (other.folder / "step-00000003.pt").symlink_to("gone")
    with store.locked():
        assert other.newest() == {"step": 7}
