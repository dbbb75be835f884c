"""Full, read-only and altered storage: real file systems in memory, which root mounts."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.reliability import case
from tests.helpers import commit_all, files, image_files, run, set_params, write_files

pytestmark = [
    pytest.mark.slow,
    pytest.mark.faults,
    pytest.mark.skipif(os.getuid() != 0 or sys.platform != "linux", reason="needs root on Linux, to mount"),
]

# What a stage writes, as far as it repeats from run to run.
OUTPUTS = {
    "extract": ["data/raw"],
    "preprocess": ["data/processed"],
    "train": ["models/classifier", "metrics/train"],
    "evaluate": ["plots/evaluate", "metrics/evaluate.json"],
    "profile": ["data/profile/operators.csv"],
    "drift": ["models/drift", "plots/drift", "metrics/drift.json"],
    "export": ["models/onnx", "metrics/export.json"],
}


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, 200 MB for a start."""
    folder = tmp_path / "disk"
    folder.mkdir()
    ended = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(folder)], capture_output=True)
    if ended.returncode != 0:
        pytest.skip("mount is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def on_disk(small_disk: Path, finished_repository: Path) -> Path:
    """The finished repository on the small disk."""
    return Path(shutil.copytree(finished_repository, small_disk / "repository", symlinks=True))


def leave_free(disk: Path, num_bytes: int) -> None:
    used = int(subprocess.run(["du", "-sk", str(disk)], check=True, capture_output=True, text=True).stdout.split()[0])
    mount("-o", f"remount,size={used * 1024 + num_bytes}", str(disk))


def give_room(disk: Path) -> None:
    mount("-o", "remount,size=200m,nr_inodes=100000", str(disk))


def outputs(repository: Path, stage: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name in OUTPUTS[stage]:
        path = repository / name
        found |= {name: path.read_bytes()} if path.is_file() else {f"{name}/{k}": v for k, v in files(path).items()}
    return found


def run_stage(repository: Path, stage: str) -> subprocess.CompletedProcess[str]:
    return run(repository, "python", "-m", f"stages.{stage}", check=False)


def cache_is_whole(cache: Path) -> bool:
    return all(
        hashlib.md5(path.read_bytes()).hexdigest() == path.parent.name + path.name
        for path in (cache / "files/md5").rglob("*")
        if path.is_file() and path.suffix != ".dir"
    )


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(
            name,
            marks=case(
                f"disk full in {name}",
                "It ends with a message and what to do; no half-written output; with room, it gives the same bytes.",
            ),
            id=name,
        )
        for name in OUTPUTS
    ],
)
def test_a_full_disk(stage: str, on_disk: Path, small_disk: Path) -> None:
    expected = outputs(on_disk, stage)
    leave_free(small_disk, 8192)
    ended = run_stage(on_disk, stage)
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.strip().splitlines()[-1].startswith(f"{stage}: error: ")
    assert "No space left on device; free some space" in ended.stderr
    assert "Traceback" not in ended.stderr
    left = {name: content for name, content in outputs(on_disk, stage).items() if "/." not in name}
    if stage != "train":  # whose record is written as it goes; DVC takes it for stale, and removes it before a run
        assert left == expected
    give_room(small_disk)
    assert run_stage(on_disk, stage).returncode == 0
    assert outputs(on_disk, stage) == expected


@case("disk full for checkpoints", "Training ends with a message that names the place; with room, it goes on.")
def test_a_full_disk_for_checkpoints(repository: Path, small_disk: Path) -> None:
    set_params(
        repository / "params.yaml",
        {"runtime.cache_dir": str(small_disk), "runtime.checkpoint_steps": 1, "train.seed": 3},
    )
    leave_free(small_disk, 20_000)
    ended = run_stage(repository, "train")
    assert ended.returncode == 1, ended.stderr
    assert "No space left on device" in ended.stderr
    assert "Traceback" not in ended.stderr
    give_room(small_disk)
    assert run_stage(repository, "train").returncode == 0


@case("disk full under dvc", "`dvc repro` fails and says so; with room, the next one ends with the same dvc.lock.")
def test_a_full_disk_under_dvc(on_disk: Path, small_disk: Path) -> None:
    before = (on_disk / "dvc.lock").read_bytes()
    leave_free(small_disk, 60_000)
    ended = run(on_disk, "dvc", "repro", "--force", "--single-item", "preprocess", check=False)
    assert ended.returncode != 0
    assert "No space left" in ended.stderr + ended.stdout
    give_room(small_disk)
    run(on_disk, "dvc", "repro")
    assert (on_disk / "dvc.lock").read_bytes() == before
    assert cache_is_whole(on_disk / ".dvc/cache")


@case("no inodes left", "A disk that has room, but for no more files: the message says so.")
def test_no_inodes(on_disk: Path, small_disk: Path) -> None:
    expected = outputs(on_disk, "preprocess")
    used = sum(1 for _ in small_disk.rglob("*")) + 1
    mount("-o", f"remount,nr_inodes={used + 2}", str(small_disk))
    ended = run_stage(on_disk, "preprocess")
    assert ended.returncode == 1, ended.stderr
    assert "inodes" in ended.stderr
    assert "Traceback" not in ended.stderr
    give_room(small_disk)
    assert outputs(on_disk, "preprocess") == expected


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(
            name, marks=case(f"read-only outputs: {name}", "It ends with a message that names the place."), id=name
        )
        for name in ("extract", "preprocess", "evaluate")
    ],
)
def test_a_read_only_workspace(stage: str, on_disk: Path, small_disk: Path) -> None:
    mount("-o", "remount,ro", str(small_disk))
    ended = run_stage(on_disk, stage)
    assert ended.returncode == 1, ended.stderr
    assert "Read-only file system; the place cannot be written to" in ended.stderr
    assert "Traceback" not in ended.stderr


@case("read-only workspace under dvc", "`dvc repro` ends at once and says why.")
def test_a_read_only_workspace_under_dvc(on_disk: Path, small_disk: Path) -> None:
    mount("-o", "remount,ro", str(small_disk))
    ended = run(on_disk, "dvc", "repro", check=False)
    assert ended.returncode != 0
    assert "Read-only file system" in ended.stderr or "read-only" in ended.stderr.lower(), ended.stderr


@pytest.fixture
def cache_on_disk(repository: Path, small_disk: Path) -> Path:
    """The repository's cache on another file system."""
    shutil.copytree(repository / ".dvc/cache", small_disk / "cache")
    shutil.rmtree(repository / ".dvc/cache")
    run(repository, "dvc", "cache", "dir", "--local", str(small_disk / "cache"))
    return small_disk / "cache"


@case("cache on another file system", "Hard links are impossible there: DVC copies, and the pipeline is the same.")
def test_a_cache_on_another_file_system(repository: Path, cache_on_disk: Path) -> None:
    before = (repository / "dvc.lock").read_bytes()
    shutil.rmtree(repository / "data")
    run(repository, "dvc", "repro", "--force", "preprocess")
    assert (repository / "dvc.lock").read_bytes() == before
    assert cache_is_whole(cache_on_disk)


@case("read-only cache", "`dvc repro` fails and says so; once the cache can be written, the next one ends well.")
def test_a_read_only_cache(repository: Path, cache_on_disk: Path, small_disk: Path) -> None:
    set_params(repository / "params.yaml", {"preprocess.interpolation": "nearest"})
    mount("-o", "remount,ro", str(small_disk))
    ended = run(repository, "dvc", "repro", "preprocess", check=False)
    assert ended.returncode != 0
    assert "Read-only file system" in ended.stderr or "read-only" in ended.stderr.lower(), ended.stderr
    mount("-o", "remount,rw", str(small_disk))
    run(repository, "dvc", "repro", "preprocess")
    assert "up to date" in run(repository, "dvc", "status", "preprocess").stdout


def cached(repository: Path, name: str) -> Path:
    """The cache entry with the content of an output."""
    digest = hashlib.md5((repository / name).read_bytes()).hexdigest()
    return repository / ".dvc/cache/files/md5" / digest[:2] / digest[2:]


def spoil(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a file's content and not its mode, by which DVC takes a cache entry for whole."""
    content, mode = path.read_bytes(), path.stat().st_mode
    path.chmod(0o644)
    path.write_bytes(change(content))
    path.chmod(mode)


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@case("images altered in the cache", "DVC checks them out without a word; preprocess refuses them by their checksum.")
def test_an_altered_cache_entry(repository: Path) -> None:
    spoil(cached(repository, "data/raw/train.tar"), flipped)
    shutil.rmtree(repository / "data/raw")
    run(repository, "dvc", "checkout")
    ended = run_stage(repository, "preprocess")
    assert ended.returncode == 2, ended.stdout
    assert "data/raw: altered since extract wrote it" in ended.stderr


@pytest.mark.parametrize(
    ("name", "made_by", "command"),
    [
        pytest.param(
            name,
            made_by,
            command,
            marks=case(
                f"altered in the cache: {name}, {command[0]}",
                f"DVC checks them out without a word; {command[0]} refuses them by their checksum.",
            ),
            id=f"{name} {command[0]}",
        )
        for name, made_by, command in (
            ("data/processed/train_images.npy", "preprocess", ("stages.train",)),
            ("data/processed/train_labels.npy", "preprocess", ("stages.train",)),
            ("data/processed/val_images.npy", "preprocess", ("stages.evaluate",)),
            ("data/processed/val_images.npy", "preprocess", ("stages.export",)),
            ("data/processed/val_images.npy", "preprocess", ("stages.drift",)),
            ("models/classifier/model.safetensors", "train", ("stages.evaluate",)),
            ("models/drift/arrays.safetensors", "drift", ("tools.monitor", "data/processed/val_images.npy")),
            ("models/onnx/model.onnx", "export", ("tools.predict", "images")),
        )
    ],
)
def test_altered_outputs(name: str, made_by: str, command: tuple[str, ...], repository: Path) -> None:
    write_files(repository / "images", image_files(num_train=1, num_val=1))
    spoil(cached(repository, name), flipped)
    shutil.rmtree((repository / name).parent)
    run(repository, "dvc", "checkout")
    ended = run(repository, "python", "-m", *command, check=False)
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert re.search(rf"{name}: (image \d+ )?altered since {made_by} wrote it", ended.stderr), ended.stderr
    assert "Traceback" not in ended.stderr
    # What it says mends it, though no intact copy is left.
    run(repository, "python", "-m", "tools.verify", "--repair")
    assert run(repository, "python", "-m", *command, check=False).returncode in (0, 10, 20)  # the monitor's verdicts
    assert cache_is_whole(repository / ".dvc/cache")


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        pytest.param(
            name,
            stage,
            marks=case(f"truncated in the cache: {name.removesuffix('.safetensors')}", f"{stage} refuses it by name."),
            id=name,
        )
        for name, stage in (
            ("data/raw/train.tar", "preprocess"),
            ("data/processed/train_images.npy", "profile"),
            ("data/processed/meta.json", "profile"),
            ("models/classifier/model.safetensors", "evaluate"),
            ("models/classifier/model.json", "evaluate"),
        )
    ],
)
def test_a_truncated_cache_entry(name: str, stage: str, repository: Path) -> None:
    spoil(cached(repository, name), lambda content: content[: len(content) // 2])
    shutil.rmtree((repository / name).parent)
    run(repository, "dvc", "checkout")
    ended = run_stage(repository, stage)
    assert ended.returncode == 2, ended.stderr
    assert str(Path(name).parent) in ended.stderr
    assert "Traceback" not in ended.stderr


def delete_outputs(folder: Path) -> None:
    for name in ("data", "models", "plots"):
        shutil.rmtree(folder / name)


def alter_outputs(folder: Path) -> None:
    for name in ("data/processed/val_images.npy", "metrics/evaluate.json", "models/drift/detector.json"):
        spoil(folder / name, flipped)


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(harm, marks=case(f"outputs {what}", f"{promise}; the lock stays the same."), id=what)
        for what, harm, promise in (
            ("deleted by hand", delete_outputs, "`dvc repro` brings them back"),
            ("altered by hand", alter_outputs, "`dvc repro` notices and makes them again"),
        )
    ],
)
def test_outputs_that_were_touched(harm: Callable[[Path], None], repository: Path) -> None:
    names = ("data/raw", "data/processed", "models", "plots")
    before, lock = files(*(repository / name for name in names)), (repository / "dvc.lock").read_bytes()
    harm(repository)
    run(repository, "dvc", "repro")
    assert files(*(repository / name for name in names)) == before
    assert (repository / "dvc.lock").read_bytes() == lock


@case("hard-linked outputs", "With cache.type hardlink no stage writes through a link: the cache stays whole.")
def test_hardlinked_outputs(repository: Path) -> None:
    run(repository, "dvc", "config", "--local", "cache.type", "hardlink,copy")
    run(repository, "dvc", "checkout", "--relink")
    assert (repository / "data/processed/train_images.npy").stat().st_nlink > 1
    set_params(repository / "params.yaml", {"preprocess.interpolation": "nearest", "sample.seed": 5})
    run(repository, "dvc", "repro", "evaluate")
    assert cache_is_whole(repository / ".dvc/cache")
    commit_all(repository)
    run(repository, "git", "checkout", "-q", "HEAD~1", "--", "params.yaml", "dvc.lock")
    run(repository, "dvc", "checkout")
    assert cache_is_whole(repository / ".dvc/cache")
