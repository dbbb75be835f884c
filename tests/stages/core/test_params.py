"""Every wrong value is refused by name. Only light modules are imported: the stages must refuse before torch loads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from stages import drift, evaluate, export, extract, preprocess, profile, train
from stages.core.errors import InputError
from stages.core.params import SECTIONS, Section, load_params, read_params
from tests.helpers import DEFAULT_PARAMS, ROOT, default_params, set_params
from tools.retrain import command as retrain

STAGES = {
    "extract": extract,
    "preprocess": preprocess,
    "train": train,
    "evaluate": evaluate,
    "profile": profile,
    "drift": drift,
    "export": export,
    "retrain": retrain,  # a tool, but its params are read in the same way
}


@pytest.fixture
def params_file(tmp_path: Path) -> Path:
    default_params(tmp_path)
    return tmp_path / "params.yaml"


@pytest.mark.parametrize("file", ["params.yaml", "tests/defaults.yaml"])
def test_what_is_committed_is_valid(file: str) -> None:
    for stage in STAGES.values():
        load_params(stage.Params, ROOT / file)


def test_the_tests_have_a_value_for_every_key() -> None:
    committed, defaults = read_params(ROOT / "params.yaml"), read_params(DEFAULT_PARAMS)
    assert {section: set(keys) for section, keys in committed.items()} == {
        section: set(keys) for section, keys in defaults.items()
    }


@pytest.mark.parametrize("stage", STAGES)
def test_the_defaults_are_read(stage: str, params_file: Path) -> None:
    params = load_params(STAGES[stage].Params, params_file)
    assert set(STAGES[stage].Params.model_fields) <= set(SECTIONS)
    with pytest.raises(ValueError, match="frozen"):
        params.runtime = None


def test_every_section_is_read_by_a_stage_or_a_tool() -> None:
    assert set().union(*(set(stage.Params.model_fields) for stage in STAGES.values())) == set(SECTIONS)


WRONG: list[tuple[str, str, Any, str]] = [
    ("extract", "data.source", "", "data.source"),
    ("extract", "data.source", 7, "data.source: 7"),
    ("extract", "data.md5", "xyz", "data.md5"),
    ("extract", "data.sha256", "0" * 63, "data.sha256"),
    ("extract", "data.max_files", 0, "data.max_files: 0 is refused.*greater than or equal to 1"),
    ("extract", "sample.image_size", 8, "sample.image_size: 8"),
    ("extract", "sample.train_images", "many", "sample.train_images: 'many'"),
    ("extract", "sample.seed", -1, "sample.seed: -1"),
    ("extract", "data.extra", "", "data.extra"),
    ("retrain", "retrain.held_out", 1, "retrain.held_out: 1 is refused.*less than 1"),
    ("retrain", "retrain.warmup_epochs", 4, "must be less than epochs"),
    ("preprocess", "preprocess.image_size", 0, "preprocess.image_size: 0"),
    ("preprocess", "preprocess.image_size", 64.5, "preprocess.image_size: 64.5"),
    ("preprocess", "preprocess.crop_mode", "centre", "preprocess.crop_mode: 'centre'.*'center', 'squash' or 'border'"),
    ("preprocess", "preprocess.on_bad_image", "ignore", "'stop' or 'skip'"),
    ("preprocess", "preprocess.interpolation", "cubic", "'bicubic'"),
    ("train", "model.name", "resnet81", "model.name: 'resnet81' is no model of timm; did you mean 'resnet1"),
    ("train", "model.name", None, "model.name: None"),
    ("train", "model.pretrained", "yes", "model.pretrained: 'yes'"),
    ("train", "model.weights", "", "model.weights"),
    ("train", "train.lr", 0, "train.lr: 0 is refused.*greater than 0"),
    ("train", "train.lr", "fast", "train.lr: 'fast' is refused.*number"),
    ("train", "train.lr", float("nan"), "train.lr: nan.*finite"),
    ("train", "train.lr", float("inf"), "train.lr: inf.*finite"),
    ("train", "train.lr", True, "train.lr: True"),
    ("train", "train.epochs", 0, "train.epochs"),
    ("train", "train.epochs", 1.5, "train.epochs"),
    ("train", "train.batch_size", -4, "train.batch_size"),
    ("train", "train.optimizer", "adam", "train.optimizer: 'adam'.*'adamw', 'sgd' or 'muon'"),
    ("train", "train.schedule", "step", "'cosine', 'linear' or 'constant'"),
    ("train", "train.label_smoothing", 1.0, "train.label_smoothing"),
    ("train", "train.crop_scale", [0.9, 0.3], r"train.crop_scale: \[0.9, 0.3\] must be \[low, high\]"),
    ("train", "train.crop_scale", [0.5], "train.crop_scale"),
    ("train", "train.crop_scale", [0.5, 1.5], "train.crop_scale.1: 1.5"),
    ("train", "train.crop_ratio", "square", "train.crop_ratio"),
    ("train", "train.flip", 2, "train.flip: 2"),
    ("train", "train.ema_decay", 1, "train.ema_decay"),
    ("train", "train.precision", "bf61", "'auto', 'fp32', 'bf16' or 'fp16'"),
    ("train", "train.grad_clip", 0, "train.grad_clip"),
    ("train", "train.warmup_epochs", 99, "train: warmup_epochs: 99.* must be less than epochs"),
    ("train", "train.momentum", 1.0, "train.momentum"),
    ("train", "train.seed", -1, "train.seed"),
    ("train", "train.log_every", 0, "train.log_every"),
    ("train", "runtime.device", "gpu", r"runtime.device: 'gpu' is no device \(valid: auto, cpu, cuda, cuda:N, mps\)"),
    ("train", "runtime.threads", 0, "runtime.threads"),
    ("train", "runtime.workers", "all", "runtime.workers"),
    ("train", "runtime.cache_dir", "", "runtime.cache_dir"),
    ("evaluate", "evaluate.num_bins", 1, "evaluate.num_bins"),
    ("evaluate", "evaluate.batch_size", 0, "evaluate.batch_size"),
    ("evaluate", "evaluate.num_mistakes", 1000, "evaluate.num_mistakes"),
    ("profile", "profile.active", 0, "profile.active"),
    ("profile", "profile.wait", -1, "profile.wait"),
    ("profile", "profile.repeat", 0, "profile.repeat"),
    ("profile", "profile.with_stack", 1, "profile.with_stack"),
]


@pytest.mark.parametrize(("stage", "key", "value", "message"), WRONG)
def test_a_wrong_value_is_refused_by_name(stage: str, key: str, value: Any, message: str, params_file: Path) -> None:
    set_params(params_file, {key: value})
    with pytest.raises(InputError, match=message):
        load_params(STAGES[stage].Params, params_file)


@pytest.mark.parametrize("stage", STAGES)
def test_unknown_and_missing_keys_are_refused_in_every_section(stage: str, params_file: Path) -> None:
    original = params_file.read_text()
    for section in STAGES[stage].Params.model_fields:
        first_key = next(iter(STAGES[stage].Params.model_fields[section].annotation.model_fields))
        set_params(params_file, {f"{section}.{first_key}x": 1})
        with pytest.raises(InputError, match=rf"{section}\.{first_key}x: unknown key; did you mean '{first_key}'\?"):
            load_params(STAGES[stage].Params, params_file)
        without_key = re.sub(rf"(\n{section}:.*\n(?:  .*\n)*?)  {first_key}: .*\n", r"\1", original)
        assert without_key != original
        params_file.write_text(without_key)
        with pytest.raises(InputError, match=rf"{section}\.{first_key}: missing key"):
            load_params(STAGES[stage].Params, params_file)
        without_section = re.sub(rf"\n{section}:.*\n(?:  .*\n)*", "\n", original)
        params_file.write_text(without_section)
        with pytest.raises(InputError, match=rf"{section}: missing section"):
            load_params(STAGES[stage].Params, params_file)
        params_file.write_text(original)


def test_an_unknown_section_is_refused_by_every_stage(params_file: Path) -> None:
    params_file.write_text(params_file.read_text() + "\ntrian:\n  lr: 1\n")
    for stage in STAGES.values():
        with pytest.raises(InputError, match="trian: unknown section; did you mean 'train'"):
            load_params(stage.Params, params_file)


def test_all_mistakes_are_told_at_once(params_file: Path) -> None:
    set_params(params_file, {"train.lr": -1, "model.name": "nope", "runtime.device": "tpu"})
    with pytest.raises(InputError) as caught:
        load_params(train.Params, params_file)
    assert all(key in str(caught.value) for key in ("train.lr", "model.name", "runtime.device"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected sections"),
        ("- a\n", "expected sections"),
        ("train: [1\n", "not valid YAML"),
        ("train:\n\tlr: 1\n", "not valid YAML"),
        ("train:\n  lr: 1\n  lr: 2\n", "not valid YAML.*duplicate key"),
        ("train: 3\n", "train: 3 is refused"),
    ],
)
def test_a_broken_file_is_refused(text: str, message: str, params_file: Path) -> None:
    params_file.write_text(text)
    with pytest.raises(InputError, match=message):
        load_params(train.Params, params_file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run stages from the root"):
        load_params(train.Params, tmp_path / "params.yaml")


def test_numbers_read_as_dvc_reads_them(params_file: Path) -> None:
    """YAML 1.1 would make 1e-3 a string; DVC's `-S train.lr=1e-3` writes it."""
    params_file.write_text(re.sub(r"\n  lr: \S+", "\n  lr: 1e-3", params_file.read_text()))
    assert load_params(train.Params, params_file).train.lr == 0.001


def test_an_integer_is_a_float_but_not_the_reverse() -> None:
    class Numbers(Section):
        share: float
        count: int

    assert Numbers(share=1, count=2).share == 1.0
    with pytest.raises(ValueError, match="count"):
        Numbers.model_validate({"share": 1, "count": 2.0})
