"""Training on a GPU: recording the step, where the pixels lie, and a kill change no result. Skipped without a GPU."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages import extract, preprocess, profile
from stages.core import device, engine, loader, model, precision
from stages.core.dataset import PackMeta, Split
from stages.core.errors import InputError
from stages.core.keyed import seed_for
from stages.core.params import load_params
from stages.train import Params
from tests.helpers import DEFAULT_PARAMS, ROOT, run, set_params, start, wait_until

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

NUM_STEPS = 12


@dataclass(frozen=True)
class Outcome:
    """Averaged weights and losses of a run."""

    weights: dict[str, torch.Tensor]
    losses: torch.Tensor

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Outcome)
        same = (torch.equal(value, other.weights[name]) for name, value in self.weights.items())
        return torch.equal(self.losses, other.losses) and all(same)


@pytest.fixture(scope="module")
def split() -> Split:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(NUM_STEPS * 16, 40, 40, 3), dtype=np.uint8)
    return Split(images, rng.integers(0, 10, size=len(images)))


@pytest.fixture(scope="module")
def meta() -> PackMeta:
    names = [str(i) for i in range(10)]
    return PackMeta(
        classes=names,
        class_ids=names,
        image_size=40,
        crop_mode="center",
        interpolation="bilinear",
        num_images={"train": NUM_STEPS * 16, "val": 0},
        num_per_class={},
        skipped={},
        mean=[0.5, 0.5, 0.5],
        std=[0.3, 0.3, 0.3],
        sha256="",
        labels_sha256={},
        source_sha256="",
    )


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    device.set_up(load_params(Params, DEFAULT_PARAMS).runtime)
    yield
    torch.use_deterministic_algorithms(False)


def train(
    split: Split,
    meta: PackMeta,
    record: bool = True,
    resident: bool = True,
    stop_at: int | None = None,
    gpu: int = 0,
    name: str | None = None,
    **changes: Any,
) -> Outcome:
    """A short run; at step `stop_at` all is saved and loaded into a new trainer."""
    params = load_params(Params, DEFAULT_PARAMS)
    recipe = params.train.model_copy(update={"image_size": 32, "batch_size": 16, "epochs": 1} | changes)
    where = torch.device("cuda", gpu)
    policy = precision.resolve(recipe.precision, where, recipe.smallest_side)
    network = params.model.model_copy(update={"name": name or params.model.name})

    def fresh() -> engine.Trainer:
        trainer = engine.create_trainer(model.create(network, 10, 0), recipe, policy, where)
        if not record:
            trainer.captured = None
        return trainer

    trainer, losses = fresh(), []
    source = loader.open_source(split, where, resident, 2)
    for step, (images, labels) in enumerate(loader.training_batches(source, meta, recipe, policy.dtype, 0)):
        if step == stop_at:
            saved = io.BytesIO()
            torch.save(trainer.state_dict(), saved)
            trainer = fresh()
            trainer.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), map_location="cpu", weights_only=True))
        device.seed(where, seed_for(0, step, 0))
        losses.append(engine.train_step(trainer, images, labels, 0.003 * (1 - step / NUM_STEPS), step))
    average = trainer.average.module.state_dict()
    return Outcome({name: value.cpu() for name, value in average.items()}, torch.stack(losses).cpu())


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "sgd"])
def test_a_run_repeats_to_the_bit(split: Split, meta: PackMeta, optimizer: str) -> None:
    first = train(split, meta, optimizer=optimizer)
    assert first.losses.isfinite().all()
    assert first == train(split, meta, optimizer=optimizer)
    assert first == train(split, meta, optimizer=optimizer, resident=False)


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "sgd"])
@pytest.mark.parametrize("changes", [{}, {"grad_accumulation": 2}, {"grad_clip": 1.0}, {"progressive": 24}])
def test_a_recorded_step_is_the_step(split: Split, meta: PackMeta, optimizer: str, changes: dict[str, Any]) -> None:
    recorded, plain = (train(split, meta, record, optimizer=optimizer, **changes) for record in (True, False))
    check_close(recorded, plain)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_step_is_recorded_on_the_gpu_that_is_asked_for(split: Split, meta: PackMeta) -> None:
    runtime = load_params(Params, DEFAULT_PARAMS).runtime
    where = device.set_up(runtime.model_copy(update={"device": "cuda:1"}))
    assert torch.cuda.current_device() == where.index == 1
    check_close(*(train(split, meta, record, gpu=1) for record in (True, False)))


def check_close(recorded: Outcome, plain: Outcome) -> None:
    assert (recorded.losses - plain.losses).abs().max() < 2e-3
    for name, value in recorded.weights.items():
        if value.is_floating_point():
            assert (value - plain.weights[name]).norm() <= 2e-3 * (1 + plain.weights[name].norm()), name


def test_a_step_that_is_recorded_draws_the_same_dropout(split: Split, meta: PackMeta) -> None:
    whole = train(split, meta, name="rexnet_100")
    assert whole == train(split, meta, name="rexnet_100", stop_at=5)


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "sgd"])
@pytest.mark.parametrize("changes", [{}, {"progressive": 24}, {"precision": "fp16"}, {"precision": "fp32"}])
def test_going_on_is_as_if_nothing_had_happened(
    split: Split, meta: PackMeta, optimizer: str, changes: dict[str, Any]
) -> None:
    whole = train(split, meta, optimizer=optimizer, **changes)
    assert whole == train(split, meta, optimizer=optimizer, stop_at=5, **changes)


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "sgd"])
@pytest.mark.parametrize("recorded_first", [True, False])
def test_one_gpu_goes_on_from_several_and_the_reverse(
    split: Split, meta: PackMeta, optimizer: str, recorded_first: bool
) -> None:
    """Several processes wrap the network, and their steps are not recorded: here the wrapper alone."""
    params = load_params(Params, DEFAULT_PARAMS)
    recipe = params.train.model_copy(update={"image_size": 32, "batch_size": 16, "optimizer": optimizer})
    where = torch.device("cuda", 0)
    policy = precision.resolve("bf16", where, recipe.smallest_side)
    source = loader.open_source(split, where, True, 0)
    images, labels = next(loader.training_batches(source, meta, recipe, policy.dtype, 0))

    def fresh(record: bool) -> engine.Trainer:
        network = model.create(params.model, 10, 0)
        wrap = (lambda network: network) if record else torch.nn.Sequential
        return engine.create_trainer(network, recipe, policy, where, wrap)

    first, second = fresh(recorded_first), fresh(not recorded_first)
    assert (second.captured is None) == recorded_first
    engine.train_step(first, images, labels, 0.003, 0)
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    own = [group.get("capturable") for group in second.optimizer.param_groups]
    second.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), map_location="cpu", weights_only=True))
    assert [group.get("capturable") for group in second.optimizer.param_groups] == own
    for step in (1, 2):
        assert engine.train_step(second, images, labels, 0.003, step).isfinite()


def test_the_profile_has_the_operators_of_a_recorded_step(workspace: Path) -> None:
    set_params(workspace / "params.yaml", {"runtime.device": "cuda"})
    extract.main(load_params(extract.Params))
    preprocess.main(load_params(preprocess.Params))
    profile.main(load_params(profile.Params))
    assert "aten::convolution_backward" in (workspace / "data/profile/operators.csv").read_text()


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_stage_goes_on(workspace: Path, which: signal.Signals) -> None:
    changes = {"sample.train_images": 600, "runtime.device": "cuda", "runtime.checkpoint_steps": 7, "train.epochs": 20}
    set_params(workspace / "params.yaml", changes)
    extract.main(load_params(extract.Params))
    preprocess.main(load_params(preprocess.Params))
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    command = ("python", "-m", "stages.train")

    def result() -> tuple[bytes, ...]:
        paths = (workspace / "models/classifier/model.safetensors", workspace / "metrics/train/metrics.json")
        return tuple(path.read_bytes() for path in paths)

    run(workspace, *command, environment=environment)
    undisturbed = result()
    process = start(workspace, *command, environment=environment)
    wait_until(lambda: any((workspace / "cache/checkpoints").glob("*/step-*.pt")))
    process.send_signal(which)
    process.wait(30)
    assert "goes on after step" in run(workspace, *command, environment=environment).stdout
    assert result() == undisturbed


def test_a_batch_too_large_for_the_memory_is_refused(workspace: Path) -> None:
    set_params(workspace / "params.yaml", {"runtime.device": "cuda"})
    extract.main(load_params(extract.Params))
    preprocess.main(load_params(preprocess.Params))
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        with pytest.raises(InputError, match="out of memory on cuda:0 at step 0"):
            from stages import train as stage

            stage.main(load_params(Params))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
