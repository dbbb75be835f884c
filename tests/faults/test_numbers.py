"""Data and numbers that no training can use, through the stages that meet them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from tests.faults.reliability import case
from tests.helpers import image_files, run, set_params, write_files

pytestmark = [pytest.mark.slow, pytest.mark.faults]

USERS = ("train", "evaluate", "profile", "drift", "export")  # of the packed arrays


def run_stage(repository: Path, stage: str) -> subprocess.CompletedProcess[str]:
    return run(repository, "python", "-m", f"stages.{stage}", check=False)


def refused(repository: Path, stage: str, *words: str) -> None:
    ended = run_stage(repository, stage)
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert ended.stderr.strip().splitlines()[-1].startswith(f"{stage}: error: "), ended.stderr
    for word in words:
        assert word in ended.stderr
    assert "Traceback" not in ended.stderr


def rewrite(path: Path, array: NDArray[Any]) -> None:
    """DVC may have made the file read-only, and a link into its cache."""
    path.unlink()
    np.save(path, array)


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(
            name, marks=case(f"labels out of range: {name}", "Refused, naming the file and the range."), id=name
        )
        for name in USERS
    ],
)
def test_labels_out_of_range(stage: str, repository: Path) -> None:
    for split in ("train", "val"):
        path = repository / f"data/processed/{split}_labels.npy"
        labels = np.load(path)
        labels[len(labels) // 2] = 10
        rewrite(path, labels)
    refused(repository, stage, "_labels.npy: labels must be 60 numbers from 0 to 9")


@case("labels that are no integers", "Labels as fractions or NaN are refused, and not rounded.")
def test_labels_that_are_fractions(repository: Path) -> None:
    path = repository / "data/processed/val_labels.npy"
    labels = np.load(path).astype(np.float64)
    labels[3] = np.nan
    rewrite(path, labels)
    refused(repository, "evaluate", "val_labels.npy")


@case("pixels as floats", "Packed images that are not uint8 are refused, naming the file.")
def test_pixels_as_floats(repository: Path) -> None:
    path = repository / "data/processed/val_images.npy"
    rewrite(path, np.load(path).astype(np.float32))
    refused(repository, "evaluate", "val_images.npy: float32")


@case("pickled array", "A packed array that holds Python objects, which could run code, is refused and not opened.")
def test_a_pickled_array(repository: Path, tmp_path: Path) -> None:
    path = repository / "data/processed/val_labels.npy"
    path.unlink()

    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return os.mkdir, (str(tmp_path / "harmed"),)

    np.save(path, np.array([Harm()], dtype=object), allow_pickle=True)
    refused(repository, "evaluate", "run `dvc repro preprocess`")
    assert not (tmp_path / "harmed").exists()


@case("one class", "A set of one class is refused: there is nothing to tell apart.")
def test_one_class(repository: Path, tmp_path: Path) -> None:
    source = write_files(tmp_path / "set", image_files(classes=("cat",)))
    set_params(repository / "params.yaml", {"data.source": str(source)})
    refused(repository, "extract", "1 class found; at least two are needed")


@case("one image a class", "Trained and evaluated; drift refuses so few validation images, by number.")
def test_one_image_a_class(repository: Path, tmp_path: Path) -> None:
    source = write_files(tmp_path / "set", image_files(num_train=1, num_val=1))
    set_params(repository / "params.yaml", {"data.source": str(source), "train.batch_size": 2})
    for stage in ("extract", "preprocess", "train", "evaluate"):
        ended = run_stage(repository, stage)
        assert ended.returncode == 0, ended.stderr
    metrics = json.loads((repository / "metrics/evaluate.json").read_text())
    assert metrics["num_images"] == 2
    assert 0 <= metrics["top1"] <= 1
    refused(repository, "drift", "validation images")


@case("one image only", "A set of one image in all is refused.")
def test_one_image(repository: Path, tmp_path: Path) -> None:
    files = dict(list(image_files(num_train=1, num_val=1).items())[:1])
    set_params(repository / "params.yaml", {"data.source": str(write_files(tmp_path / "set", files))})
    refused(repository, "extract", "no folder has both train/<class>/ and val/<class>/")


@case("batch larger than the data", "Refused, naming `train.batch_size` and the number of images.")
def test_a_batch_larger_than_the_data(repository: Path) -> None:
    set_params(repository / "params.yaml", {"train.batch_size": 61})
    refused(repository, "train", "train.batch_size: 61 is more than the 60 training images")


@case("batch of one", "Normalisation over one image of one pixel is impossible: refused by name, or trained.")
def test_a_batch_of_one(repository: Path) -> None:
    set_params(repository / "params.yaml", {"train.batch_size": 1, "train.epochs": 2})
    ended = run_stage(repository, "train")
    assert ended.returncode in (0, 2), ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(name, marks=case(f"diverging {name}", "Stopped with the step, and what to change."), id=name)
        for name in ("sgd", "adamw", "muon")
    ],
)
def test_a_rate_that_diverges(optimizer: str, repository: Path) -> None:
    overrides = {"train.optimizer": optimizer, "train.lr": 1e30, "train.warmup_epochs": 0.0, "train.weight_decay": 0.0}
    set_params(repository / "params.yaml", overrides | {"train.schedule": "constant"})
    refused(repository, "train", "lower train.lr")


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(name, marks=case(f"NaN weights: {name}", "Refused: NaN is never reported."), id=name)
        for name in ("evaluate", "drift", "export")
    ],
)
def test_weights_that_are_not_numbers(stage: str, repository: Path) -> None:
    path = repository / "models/classifier/model.safetensors"
    state = load_file(path)
    largest = max(state, key=lambda name: state[name].size)
    state[largest] = np.full_like(state[largest], np.nan)
    description = path.with_name("model.json")
    spec = json.loads(description.read_text())
    for file in (path, description):
        file.unlink()
    save_file(state, path)
    description.write_text(json.dumps(spec | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}))
    refused(repository, stage, "finite")
