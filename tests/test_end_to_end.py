"""The user's commands on a tiny repository with the real dvc and git."""

from __future__ import annotations

import json
import re
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import ROOT, commit_all, copy_of_checkout, default_params, image_files, run, set_params, write_files

STAGES = ["extract", "preprocess", "train", "evaluate", "profile", "drift", "export"]


def stages_run(output: str) -> list[str]:
    return re.findall(r"Running stage '(\w+)'", output)


def is_clean(repository: Path) -> bool:
    return run(repository, "git", "status", "--porcelain").stdout == ""


def test_a_run_leaves_all_that_it_promises_and_git_clean(repository: Path) -> None:
    assert is_clean(repository)
    assert run(repository, "dvc", "status").stdout.strip() == "Data and pipelines are up to date."
    for path in (
        "models/classifier/model.safetensors",
        "models/onnx/model.onnx",
        "data/profile/trace-1.json.gz",
        "metrics/profile.json",
    ):
        assert (repository / path).exists()
    tracked = run(repository, "git", "ls-files").stdout.split()
    assert {"dvc.lock", "metrics/evaluate.json", "plots/evaluate/confusion.png"} <= set(tracked)
    assert not [path for path in tracked if path.startswith(("data/", "models/"))]


def test_a_second_run_does_nothing(repository: Path) -> None:
    output = run(repository, "dvc", "repro").stdout
    assert stages_run(output) == []
    assert is_clean(repository)


def test_a_forced_run_gives_the_same_lock(repository: Path) -> None:
    """Every hashed output repeats to the bit, the profile's too."""
    before = (repository / "dvc.lock").read_bytes()
    assert stages_run(run(repository, "dvc", "repro", "--force").stdout) == STAGES
    assert (repository / "dvc.lock").read_bytes() == before
    assert is_clean(repository)


@pytest.mark.slow
def test_a_new_clone_makes_the_same_outputs(repository: Path, tmp_path: Path) -> None:
    run(tmp_path, "git", "clone", "-q", str(repository), "clone")
    # evaluate need not run: its outputs are in git, and the model is the same to the bit
    assert stages_run(run(tmp_path / "clone", "dvc", "repro").stdout) == [
        "extract",
        "preprocess",
        "train",
        "profile",
        "drift",
        "export",
    ]
    assert is_clean(tmp_path / "clone")
    assert stages_run(run(tmp_path / "clone", "dvc", "repro").stdout) == []


def test_changing_the_learning_rate_reruns_training_and_what_follows(repository: Path) -> None:
    output = run(repository, "dvc", "exp", "run", "-S", "train.lr=0.0005", "-n", "slow").stdout
    assert stages_run(output) == ["train", "evaluate", "profile", "drift", "export"]
    assert "train.lr" in run(repository, "dvc", "exp", "show", "--csv").stdout.splitlines()[0]
    difference = json.loads(run(repository, "dvc", "exp", "diff", "HEAD", "slow", "--json").stdout)
    assert difference["params"]["params.yaml"]["train.lr"] == {"old": 0.01, "new": 0.0005, "diff": -0.0095}
    assert "top1" in run(repository, "dvc", "metrics", "diff", "--all").stdout
    assert (repository / "params.yaml").read_text().count("#") == (ROOT / "params.yaml").read_text().count("#")
    page = run(repository, "dvc", "plots", "diff", "HEAD", "slow", "-o", "page").stdout
    assert page.strip().endswith("index.html")
    # back to the committed state, out of the cache
    run(repository, "git", "checkout", "-q", ".")
    assert stages_run(run(repository, "dvc", "repro").stdout) == []


def test_changing_what_only_evaluate_imports_reruns_evaluate_only(repository: Path) -> None:
    path = repository / "stages/core/metrics.py"
    path.write_text(path.read_text() + "\n# a comment\n")
    assert stages_run(run(repository, "dvc", "repro").stdout) == ["evaluate"]


def test_changing_the_runtime_reruns_the_profile_only(repository: Path) -> None:
    set_params(repository / "params.yaml", {"runtime.threads": 2})
    assert stages_run(run(repository, "dvc", "repro").stdout) == ["profile"]


@pytest.mark.slow
def test_a_temporary_run_leaves_the_workspace_alone(repository: Path) -> None:
    output = run(repository, "dvc", "exp", "run", "--temp", "-S", "train.seed=1", "-n", "other-seed").stdout
    assert stages_run(output) == ["train", "evaluate", "profile", "drift", "export"]
    assert is_clean(repository)
    assert "other-seed" in run(repository, "dvc", "exp", "list", "--name-only").stdout


@pytest.mark.slow
def test_a_queue_runs_every_combination(repository: Path) -> None:
    run(repository, "dvc", "exp", "run", "--queue", "-S", "train.lr=0.001,0.002")
    assert run(repository, "dvc", "queue", "status").stdout.count("Queued") == 2
    run(repository, "dvc", "queue", "start")
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        status = run(repository, "dvc", "queue", "status").stdout
        if status.count("Success") + status.count("Failed") == 2 and "No experiment task" not in status:
            break
        time.sleep(2)
    assert status.count("Success") == 2, status
    names = run(repository, "dvc", "exp", "list", "--name-only").stdout.split()
    assert len(names) == 2
    assert is_clean(repository)


@pytest.mark.slow
def test_a_repository_without_commits(make_repository: Callable[..., Path]) -> None:
    repository = make_repository(commit=False)
    assert stages_run(run(repository, "dvc", "repro").stdout) == STAGES
    assert stages_run(run(repository, "dvc", "repro").stdout) == []


def test_a_folder_and_an_archive_of_ones_own(repository: Path, tmp_path: Path) -> None:
    source = write_files(tmp_path / "pets", image_files(num_train=15, num_val=5))
    set_params(repository / "params.yaml", {"data.source": str(source)})
    assert stages_run(run(repository, "dvc", "repro", "evaluate").stdout) == STAGES[:4]
    assert json.loads((repository / "models/classifier/model.json").read_text())["classes"] == ["cat", "dog"]
    with tarfile.open(tmp_path / "pets.tgz", "w:gz") as tar:
        tar.add(source, arcname="pets")
    set_params(repository / "params.yaml", {"data.source": str(tmp_path / "pets.tgz")})
    # the same images: extract finds the same content, and nothing after it is stale
    assert stages_run(run(repository, "dvc", "repro", "evaluate").stdout) == ["extract"]


def test_a_refused_source_costs_nothing(repository: Path, tmp_path: Path) -> None:
    """Neither the images that were there nor the lock are touched, and the way back runs nothing."""
    files = image_files() | {"train/cat/text.jpg": b"hello"}
    set_params(repository / "params.yaml", {"data.source": str(write_files(tmp_path / "bad", files))})
    result = run(repository, "dvc", "repro", check=False)
    assert result.returncode != 0
    assert "extract: error: train/cat/text.jpg: is not an image" in result.stderr + result.stdout
    assert "Traceback" not in result.stderr + result.stdout
    assert (repository / "data/raw/train.tar").exists()
    run(repository, "git", "checkout", "-q", "params.yaml")
    assert stages_run(run(repository, "dvc", "repro").stdout) == []


@pytest.mark.parametrize(
    ("stage", "key", "value"),
    [
        ("extract", "data.source", "imagenete"),
        ("preprocess", "preprocess.crop_mode", "centre"),
        ("train", "model.name", "resnet81"),
        ("evaluate", "evaluate.num_bins", 0),
        ("profile", "profile.active", 0),
        ("drift", "drift.alpha", 0),
        ("export", "runtime.device", "gpu"),
    ],
)
def test_a_wrong_param_is_refused_before_anything_heavy_loads(
    stage: str, key: str, value: object, repository: Path
) -> None:
    set_params(repository / "params.yaml", {key: value})
    before = run(repository, "git", "status", "--porcelain").stdout
    result = run(repository, "python", "-X", "importtime", "-m", f"stages.{stage}", check=False)
    assert result.returncode == 2
    imports = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    message = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert len(message) == 1
    assert message[0].startswith(f"{stage}: error: params.yaml: {key}")
    assert len(imports) > 100
    assert not [line for line in imports if line.split("|")[-1].strip() in ("torch", "timm", "sklearn", "dvc")]
    assert run(repository, "git", "status", "--porcelain").stdout == before


@pytest.mark.slow
def test_the_default_run_is_good_and_not_too_easy(tmp_path: Path) -> None:
    repository = copy_of_checkout(tmp_path)
    default_params(repository)
    run(repository, "git", "init", "-q")
    commit_all(repository)
    run(repository, "dvc", "repro", "evaluate")
    top1 = json.loads((repository / "metrics/evaluate.json").read_text())["top1"]
    assert 0.85 <= top1 < 0.99
    assert json.loads((repository / "data/processed/meta.json").read_text())["num_images"] == {
        "train": 2000,
        "val": 1500,
    }
