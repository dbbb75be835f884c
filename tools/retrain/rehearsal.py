"""A clone in which what happens leaves the repository alone, and new images of the generated sample for it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from ruamel.yaml import YAML

from stages.core import sample
from stages.core.corruptions import corrupt
from stages.core.errors import InputError
from stages.core.image import decode
from stages.core.params import Section, load_params
from stages.extract import DataParams, SampleParams
from tools.shared import commands

LESS_MEASURING = {"drift.images_per_condition": 40, "drift.resplits": 3}  # to save time
_SPLIT = 2  # of the generator: 0 is train, 1 is val


class Params(Section):
    """What a rehearsal reads of params.yaml."""

    data: DataParams
    sample: SampleParams


class NewImages(Protocol):
    """Images that no model has seen, each with an index, whose remainder by the number of classes is its class."""

    classes: Sequence[str]

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """An image, uint8 (size, size, 3)."""
        ...


class NewSampleImages:
    """Those of the generator."""

    classes: Sequence[str] = sample.CLASSES

    def __init__(self, params: SampleParams) -> None:
        """As params.yaml has the generator."""
        self._params = params

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """An image, uint8 (size, size, 3)."""
        size = self._params.image_size
        return decode(sample.render(self._params.seed, _SPLIT, index, size), str(index), size)


def sample_params() -> SampleParams:
    """The generator's params; InputError where the repository is not of the generated sample, or no repository."""
    check_repository()
    params = load_params(Params)
    if params.data.source != "sample":
        raise InputError(f"params.yaml: data.source: this needs the generated sample, not {params.data.source!r}")
    return params.sample


def check_repository() -> None:
    """InputError where no repository is."""
    if not Path(".git").exists():
        raise InputError("no git repository here; run this from the root of the repository")


def clone_and_run(root: Path, clone: Path, overrides: dict[str, Any]) -> None:
    """Clone the last commit with its data and model, out of this repository's cache or made anew; commit the result."""
    run(root, "git", "clone", "--quiet", "--no-hardlinks", str(root), str(clone))
    identify(clone)
    run(clone, *dvc("config", "--local", "core.analytics", "false"))
    cache = run(root, *dvc("cache", "dir")).strip()
    run(clone, *dvc("remote", "add", "--quiet", "--local", "here", cache))
    run(clone, *dvc("pull", "--quiet", "--remote", "here", "--allow-missing"), check=False)
    yaml = YAML()
    document = yaml.load((clone / "params.yaml").read_text())
    for key, value in overrides.items():
        section, name = key.split(".")
        document[section][name] = value
    with (clone / "params.yaml").open("w") as file:
        yaml.dump(document, file)
    run(clone, *dvc("repro"), quiet=False)
    run(clone, "git", "add", "--all")
    run(clone, "git", "commit", "--quiet", "--allow-empty", "--message", "As made here")


def identify(clone: Path) -> None:
    """Let commits be made in a clone where the user may have told git no name."""
    for key, value in (("user.name", "rehearsal"), ("user.email", "rehearsal@localhost")):
        run(clone, "git", "config", key, value)


def write_images(
    folder: Path,
    images: NewImages,
    indices: Iterable[int],
    drift: tuple[str, int] | None = None,
    by_class: bool = False,
    shift: int = 0,
) -> Path:
    """Write new images as PNG, corrupted by `drift`; below <class>/ if asked, and there `shift` classes off."""
    for index in indices:
        pixels = images.pixels(index)
        if drift is not None:
            pixels = corrupt(pixels[None], *drift, np.array([index]), seed=7)[0]
        label = (index + shift) % len(images.classes)
        path = (folder / images.classes[label] if by_class else folder) / f"{index:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
        path.write_bytes(buffer.getvalue())
    return folder


def monitor(clone: Path, images: Path) -> dict[str, Any]:
    """The verdict of tools.monitor in a clone."""
    out = clone.parent / "verdict.json"
    out.unlink(missing_ok=True)
    module(clone, "tools.monitor", str(images), "--json", str(out))
    verdict: dict[str, Any] = json.loads(out.read_text())
    return verdict


def dvc(*words: str) -> list[str]:
    """A command of dvc's."""
    return [sys.executable, "-m", "dvc", *words]


def module(folder: Path, *words: str) -> int:
    """Run a tool of ours, its words shown; returns its exit status, of which 2 raises InputError."""
    status = subprocess.run([sys.executable, "-m", *words], cwd=folder, env=environment()).returncode  # noqa: S603
    if status == 2:
        raise InputError(f"python -m {words[0]} failed; its words are above")
    return status


def run(folder: Path, *command: str, check: bool = True, quiet: bool = True) -> str:
    """Run another program; returns what it prints, or raises InputError with its words."""
    result = subprocess.run(  # noqa: S603
        command, cwd=folder, env=environment(), text=True, stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.PIPE if quiet else None,
    )  # fmt: skip
    if check and result.returncode:
        raise InputError(f"`{' '.join(command[:5])}` failed: {(result.stderr or '').strip()}")
    return result.stdout or ""


def environment() -> dict[str, str]:
    """That in which stages are run, outside of any repository of DVC's."""
    return {key: value for key, value in commands.environment().items() if key != "DVC_ROOT"}
