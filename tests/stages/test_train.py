"""The train stage on tiny data, in this process; its runs under DVC are in test_end_to_end.py."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stages import evaluate, preprocess, profile, train
from stages.core import model, precision
from stages.core.dataset import load_meta
from stages.core.distributed import World
from stages.core.errors import InputError
from stages.core.params import load_params
from stages.core.stopping import StopRequest
from tests.helpers import files, set_params


def run_train(workspace: Path, **overrides: object) -> None:
    set_params(workspace / "params.yaml", {key.replace("__", "."): value for key, value in overrides.items()})
    train.main(load_params(train.Params))


def history(workspace: Path, name: str) -> list[tuple[int, float]]:
    path = workspace / f"metrics/train/plots/metrics/{name}.tsv"
    with path.open() as file:
        return [(int(row["step"]), float(row[name.split("/")[-1]])) for row in csv.DictReader(file, delimiter="\t")]


def test_images_that_are_enlarged_are_told_of(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_train(packed, train__image_size=48)
    assert "train.image_size: 48 is more than the packed images have" in capsys.readouterr().err


def test_what_a_run_leaves(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_train(packed)
    assert "enlarged" not in capsys.readouterr().err
    spec = model.load_spec(packed / "models/classifier")
    meta = load_meta()
    assert (spec.architecture, spec.image_size, spec.classes, spec.mean) == ("test_resnet", 32, meta.classes, meta.mean)
    # 60 images in batches of 20 for 2 epochs: 6 steps, logged every 2 and at each epoch's end
    assert [step for step, _ in history(packed, "train/loss")] == [2, 3, 5, 6]
    assert [step for step, _ in history(packed, "val/top1")] == [3, 6]
    summary = json.loads((packed / "metrics/train/metrics.json").read_text())
    assert summary["epoch"] == 2
    assert summary["step"] == 6
    assert math.isfinite(summary["val"]["loss"])


def test_the_same_params_give_the_same_bytes(packed: Path) -> None:
    run_train(packed)
    first = files(packed / "models") | files(packed / "metrics")
    run_train(packed)
    assert files(packed / "models") | files(packed / "metrics") == first
    run_train(packed, train__seed=1)
    assert files(packed / "models") != {name: first[name] for name in files(packed / "models")}


@pytest.mark.parametrize("overrides", [
    {"train__optimizer": "sgd", "train__schedule": "linear", "train__grad_clip": 1.0},
    {"train__ema_decay": 0.0, "train__warmup_epochs": 0.0, "train__schedule": "constant"},
    {"train__precision": "fp32", "train__label_smoothing": 0.0, "train__image_size": 24},
    {"train__precision": "bf16", "model__name": "test_vit"},
])  # fmt: skip
def test_every_kind_of_recipe_runs(overrides: dict[str, object], packed: Path) -> None:
    if overrides.get("model__name") == "test_vit":
        set_params(packed / "params.yaml", {"preprocess.image_size": 160, "train.image_size": 160})
        preprocess.main(load_params(preprocess.Params))
    run_train(packed, **overrides)
    assert (packed / "models/classifier/model.safetensors").exists()


def test_machines_that_compute_otherwise_do_not_share_checkpoints_and_do_not_train_together(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Muon computes in bfloat16 where the hardware has it, whatever train.precision says."""
    keys = set()
    for has_bf16 in (False, True):
        monkeypatch.setattr(precision, "has_bf16", lambda device, has_bf16=has_bf16: has_bf16)
        monkeypatch.setattr(World, "check_same", lambda world, what, key: keys.add(key))
        run_train(packed, train__precision="fp32")
    assert len(keys) == 2


def test_divergence_stops_the_run_and_writes_no_model(packed: Path) -> None:
    with pytest.raises(InputError, match=r"the loss is (nan|inf) at step \d+, learning rate .*lower train\.lr"):
        run_train(packed, train__lr=1e30, train__optimizer="sgd", train__warmup_epochs=0.0, train__epochs=6)
    assert not (packed / "models").exists()


def test_a_batch_larger_than_the_data_is_refused(packed: Path) -> None:
    with pytest.raises(InputError, match=r"train\.batch_size: 64 is more than the 60 training images"):
        run_train(packed, train__batch_size=64)


def test_missing_data_says_what_to_run(workspace: Path) -> None:
    with pytest.raises(InputError, match="dvc repro preprocess"):
        run_train(workspace)


def test_fine_tuning_starts_from_the_file(packed: Path) -> None:
    run_train(packed)
    (packed / "models/classifier/model.safetensors").rename(packed / "start.safetensors")
    frozen: dict[str, object] = {"train__lr": 1e-12, "train__weight_decay": 0.0, "train__ema_decay": 0.0}
    run_train(packed, model__weights="start.safetensors", **frozen)
    before, after = load_file("start.safetensors"), load_file("models/classifier/model.safetensors")
    for name in before:
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(before[name], after[name], atol=1e-5, rtol=0)


def test_a_run_from_weights_that_were_replaced_is_another_run(packed: Path) -> None:
    run_train(packed)
    state = load_file("models/classifier/model.safetensors")
    set_params(packed / "params.yaml", {"model.weights": "start.safetensors"})

    def checkpoints() -> Path:
        cpu = torch.device("cpu")
        params = load_params(train.Params)
        return train._open_session(params, load_meta(), 3, cpu, World(cpu), StopRequest()).store.folder

    save_file(state, "start.safetensors")
    before = checkpoints()
    assert checkpoints() == before
    save_file({name: value + 1 for name, value in state.items()}, "start.safetensors")
    assert checkpoints() != before


def test_a_checkpoint_that_is_due_is_wished_for_once(packed: Path) -> None:
    """Several processes save at the step after it, by which time it must not be due again."""
    set_params(packed / "params.yaml", {"runtime.checkpoint_seconds": 30})
    cpu = torch.device("cpu")
    session = train._open_session(load_params(train.Params), load_meta(), 3, cpu, World(cpu), StopRequest())
    assert session._wish() == 0
    session._saved_at -= 31
    assert [session._wish(), session._wish()] == [1, 0]


def test_evaluate_measures_what_train_left(packed: Path) -> None:
    run_train(packed, train__epochs=6, train__precision="fp32")
    evaluate.main(load_params(evaluate.Params))
    results = json.loads((packed / "metrics/evaluate.json").read_text())
    last = json.loads((packed / "metrics/train/metrics.json").read_text())["val"]
    assert results["top1"] == pytest.approx(last["top1"], abs=1e-6)
    assert results["nll"] == pytest.approx(last["loss"], abs=1e-4)
    assert set(results) == {"top1", "macro_f1", "nll", "ece", "num_images"}
    with (packed / "plots/evaluate/confusion.csv").open() as file:
        pairs = list(csv.DictReader(file))
    assert np.mean([pair["actual"] == pair["predicted"] for pair in pairs]) == pytest.approx(results["top1"])
    pictures = ["confusion.png", "mistakes.png", "reliability.png"]
    tables = ["confusion.csv", "per_class.csv", "precision_recall.json", "reliability.json"]
    assert sorted(path.name for path in (packed / "plots/evaluate").iterdir()) == sorted(pictures + tables)
    first = files(packed / "plots") | {"metrics": (packed / "metrics/evaluate.json").read_bytes()}
    evaluate.main(load_params(evaluate.Params))
    assert files(packed / "plots") | {"metrics": (packed / "metrics/evaluate.json").read_bytes()} == first


def test_a_precision_that_a_device_lacks_is_refused_by_its_own_key(packed: Path) -> None:
    set_params(packed / "params.yaml", {"evaluate.precision": "fp16", "runtime.device": "cpu"})
    train.main(load_params(train.Params))
    with pytest.raises(InputError, match=r"params\.yaml: evaluate\.precision: fp16 needs a GPU"):
        evaluate.main(load_params(evaluate.Params))
    set_params(packed / "params.yaml", {"train.precision": "fp16"})
    with pytest.raises(InputError, match=r"params\.yaml: train\.precision: fp16 needs a GPU"):
        train.main(load_params(train.Params))


def test_evaluate_refuses_a_model_of_other_classes(packed: Path) -> None:
    run_train(packed)
    path = packed / "models/classifier/model.json"
    path.write_text(path.read_text().replace('"arrow"', '"bow"'))
    with pytest.raises(InputError, match="models/classifier was trained on other classes"):
        evaluate.main(load_params(evaluate.Params))


def test_profile_measures_and_records(packed: Path) -> None:
    overrides = {"profile.repeat": 2, "profile.with_stack": True}
    set_params(packed / "params.yaml", overrides)
    profile.main(load_params(profile.Params))
    names = files(packed / "data/profile")
    assert sorted(names) == [
        "memory-1.png", "memory-2.png", "operators.csv", "operators.txt", "trace-1.json.gz", "trace-2.json.gz",
    ]  # fmt: skip
    numbers = json.loads((packed / "metrics/profile.json").read_text())
    assert set(numbers) == {
        "images_per_second", "step_ms_p50", "step_ms_p95", "data_wait_share", "peak_memory_mb", "flops_per_image",
        "model", "image_size", "batch_size",
    }  # fmt: skip
    assert numbers["step_ms_p95"] >= numbers["step_ms_p50"] > 0
    assert 0 < numbers["data_wait_share"] < 1
    table = names["operators.csv"].decode()
    assert "aten::convolution_backward" in table
    set_params(packed / "params.yaml", {"profile.repeat": 1})
    profile.main(load_params(profile.Params))
    assert files(packed / "data/profile")["operators.csv"].decode() == table, "the hashed out does not repeat"


def test_profile_measures_the_share_of_one_process(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_params(packed / "params.yaml", {"runtime.processes": 2})
    profile.main(load_params(profile.Params))
    assert "ms a step of 10 on cpu (one of 2 processes)" in capsys.readouterr().out
    table = (packed / "data/profile/operators.csv").read_text()
    assert "[10, 3, 32, 32]" in table
    assert "[20, 3, 32, 32]" not in table
    numbers = json.loads((packed / "metrics/profile.json").read_text())
    assert numbers["images_per_second"] < 1.5 * 10 / (numbers["step_ms_p50"] / 1e3), "more than the share was counted"
    set_params(packed / "params.yaml", {"runtime.processes": 3})
    with pytest.raises(InputError, match=r"train\.batch_size: 20 does not divide into 3 processes"):
        profile.main(load_params(profile.Params))


@pytest.mark.parametrize("stage", [train, profile])
def test_one_image_at_a_time_is_refused_where_there_are_batch_norms(stage: ModuleType, packed: Path) -> None:
    set_params(packed / "params.yaml", {"train.batch_size": 1})
    with pytest.raises(InputError, match=r"train\.batch_size: 1: batch normalisation needs more than one image"):
        stage.main(load_params(stage.Params))


def test_profile_counts_the_floating_point_operations(packed: Path) -> None:
    """ResNet-18 at 224 px takes 1.82 G multiply-adds forward, backward twice that but for the first layer's input."""
    set_params(packed / "params.yaml", {"model.name": "resnet18"})
    profile.main(load_params(profile.Params))
    found = json.loads((packed / "metrics/profile.json").read_text())["flops_per_image"]
    forward = 2 * 1.82e9 * (32 / 224) ** 2
    assert 2.6 * forward < found < 3.0 * forward
