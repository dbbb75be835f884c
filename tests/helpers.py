"""What tests share: tiny real data, tiny real repositories, the real dvc."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PATIENCE = 600.0  # seconds: on a machine with other work, things take ten times as long as on a quiet one
STARTED: list[subprocess.Popen[str]] = []  # by `start`

# Of the experiment that is committed here; a user's params.yaml has other ones.
DEFAULT_PARAMS = ROOT / "tests/defaults.yaml"

# Overrides under which the whole pipeline takes seconds.
TINY: dict[str, Any] = {
    "sample.train_images": 60,
    "sample.val_images": 60,
    "sample.image_size": 32,
    "preprocess.image_size": 32,
    "model.name": "test_resnet",
    "train.image_size": 32,
    "train.epochs": 2,
    "train.batch_size": 20,
    "train.log_every": 2,
    "evaluate.num_mistakes": 6,
    "profile.timed_steps": 2,
    "profile.active": 2,
    "profile.profile_memory": True,
    "drift.window_sizes": [4],
    "drift.axes": 4,
    "drift.null_windows": 99,
    "drift.images_per_condition": 8,
    "drift.fit_images": 8,
    "drift.resplits": 2,
    "runtime.device": "cpu",
    "runtime.threads": 1,
    "runtime.workers": 0,
}


def default_params(folder: Path, overrides: dict[str, Any] | None = None) -> None:
    """Write this repository's params.yaml into a folder, its values the default ones but for `overrides`."""
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    sections = YAML(typ="safe").load(DEFAULT_PARAMS.read_text())
    defaults = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    set_params(folder / "params.yaml", defaults | (overrides or {}))


def set_params(path: Path, overrides: dict[str, Any]) -> None:
    """Change keys such as `train.lr` of a params.yaml in place, comments kept."""
    yaml = YAML()
    document = yaml.load(path.read_text())
    for key, value in overrides.items():
        section, name = key.split(".")
        document[section][name] = value
    with path.open("w") as file:
        yaml.dump(document, file)


def run(
    folder: Path, *command: str, check: bool = True, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder with this environment's python and dvc first on PATH."""
    # A machine with other work has taken ten minutes for a whole pipeline.
    result = subprocess.run(
        command, cwd=folder, env=_environment(environment), capture_output=True, text=True, timeout=1800
    )
    if check:
        assert result.returncode == 0, f"{command}: rc {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def start(folder: Path, *command: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a command as `run` does, both outputs in one pipe, in a process group of its own.

    What still runs when the test is over, because it failed, is ended (tests/conftest.py).
    """
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=_environment(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    STARTED.append(process)
    return process


def _environment(changes: dict[str, str] | None) -> dict[str, str]:
    env = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": ""} | (changes or {})
    env.pop("DVC_ROOT", None)
    return env


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE, poll: float = 0.01) -> None:
    """Wait for a condition; fail when it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(poll)


def files(*folders: Path) -> dict[str, bytes]:
    """Content of all files below folders, by path relative to the folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file()
    }


def step_reached(folder: Path) -> int:
    """The optimizer step that metrics/train tells, 0 before the first record."""
    try:
        return int(json.loads((folder / "metrics/train/metrics.json").read_text())["step"])
    except (FileNotFoundError, ValueError):
        return 0


def copy_of_checkout(folder: Path) -> Path:
    """Copy what git knows or would add of this repository, and neither data nor DVC's cache."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def commit_all(folder: Path) -> None:
    run(folder, "git", "add", "-A")
    run(folder, "git", "-c", "user.name=t", "-c", "user.email=t@example.com", "commit", "-qm", "state")


@contextmanager
def nobody() -> Iterator[None]:
    """Not root, who may list any folder; paths must be relative, for what is above the working directory is closed."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def picture(seed: int = 0, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> Image.Image:
    """A random but smooth image."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, size=(4, 4, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def image_files(num_train: int = 4, num_val: int = 2, classes: tuple[str, ...] = ("cat", "dog")) -> dict[str, bytes]:
    """A valid image set as {path: content}."""
    return {
        f"{split}/{name}/{i}.jpg": encoded(picture(1000 * label + 10 * i + (split == "val"), (64, 64)), quality=98)
        for split, count in (("train", num_train), ("val", num_val))
        for label, name in enumerate(classes)
        for i in range(count)
    }


def truncated(content: bytes) -> bytes:
    """The header of an image and most of its pixels."""
    return content[: int(0.8 * len(content))]


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder
