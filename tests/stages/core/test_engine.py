"""The train step does what it says, twice the same, and notices when it diverges."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

from stages import profile
from stages.core import engine, inference, model, precision
from stages.core.device import set_up
from stages.core.errors import InputError
from stages.core.params import load_params
from stages.core.recipe import TrainParams
from stages.train import Params
from tests.helpers import DEFAULT_PARAMS, TINY

CPU = torch.device("cpu")


@pytest.fixture
def params() -> Params:
    params = load_params(Params, DEFAULT_PARAMS)
    network = params.model.model_copy(update={"name": TINY["model.name"]})
    set_up(params.runtime.model_copy(update={"device": "cpu", "threads": 1}))
    return params.model_copy(update={"model": network})


def batch(count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 32, 32, generator=generator), torch.arange(count) % 3


def trainer(params: Params, dtype: str = "fp32", **changes: object) -> engine.Trainer:
    train: TrainParams = params.train.model_copy(update=changes)
    network = model.create(params.model, 3, train.seed)
    return engine.create_trainer(network, train, precision.resolve(dtype, CPU), CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_steps_lower_the_loss(dtype: str, optimizer: str, params: Params) -> None:
    images, labels = batch()
    state = trainer(params, dtype, optimizer=optimizer, label_smoothing=0.0)
    losses = [engine.train_step(state, images, labels, 0.01, step).item() for step in range(20)]
    assert losses[-1] < 0.3 * losses[0]


def test_the_same_run_gives_the_same_bits(params: Params) -> None:
    images, labels = batch()
    states = []
    for _ in range(2):
        state = trainer(params, "bf16", grad_clip=1.0)
        for step in range(5):
            engine.train_step(state, images, labels, 0.01, step)
        states.append(state.average.module.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def test_the_average_lags_behind_and_can_be_switched_off(params: Params) -> None:
    images, labels = batch()
    averaged, plain = trainer(params, ema_decay=0.99), trainer(params, ema_decay=0.0)
    for state in (averaged, plain):
        for step in range(5):
            engine.train_step(state, images, labels, 0.01, step)
    assert plain.average.module is plain.model
    weights = next(averaged.model.parameters())
    assert torch.equal(weights, next(plain.model.parameters())), "averaging changed the training"
    assert not torch.equal(weights, next(averaged.average.module.parameters()))


def test_gradients_are_clipped(params: Params) -> None:
    images, labels = batch()
    state = trainer(params, grad_clip=0.01)
    engine.train_step(state, 100 * images, labels, 0.0, 0)
    norm = torch.cat([p.grad.flatten() for p in state.model.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


def test_divergence_is_told_with_its_step() -> None:
    losses = torch.tensor([1.0, float("nan"), float("inf")])
    with pytest.raises(InputError, match=r"the loss is nan at step 101, learning rate 0\.2.*lower train\.lr"):
        engine.check_losses(losses, 100, [0.1, 0.2, 0.3])
    assert engine.check_losses(torch.tensor([1.0, 3.0]), 0, [0.1, 0.1]) == 2.0


def test_prediction_neither_depends_on_batches_nor_changes_the_model(params: Params) -> None:
    images, _ = batch(12)
    network = trainer(params).model
    before = copy.deepcopy(network.state_dict())
    policy = precision.resolve("fp32", CPU)
    whole = inference.predict(network, [images], policy)
    parts = inference.predict(network, [images[:5], images[5:10], images[10:]], policy)
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-5)
    assert whole.shape == (12, 3)
    assert network.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), network.state_dict().values(), strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_a_trainer_goes_on_from_its_state_to_the_bit(optimizer: str, params: Params) -> None:
    images, labels = batch()
    whole = trainer(params, "bf16", optimizer=optimizer)
    for step in range(6):
        engine.train_step(whole, images, labels, 0.01, step)
    first = trainer(params, "bf16", optimizer=optimizer)
    for step in range(3):
        engine.train_step(first, images, labels, 0.01, step)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = trainer(params, "bf16", optimizer=optimizer)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    for step in range(3, 6):
        engine.train_step(second, images, labels, 0.01, step)
    for one, other in ((whole.model, second.model), (whole.average.module, second.average.module)):
        pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_trainer_goes_on_from_the_state_of_a_gpu_that_recorded_its_steps(params: Params) -> None:
    images, labels = batch()
    first = trainer(params, optimizer="adamw")
    engine.train_step(first, images, labels, 0.01, 0)
    state = first.state_dict()
    for group in state["optimizer"]["param_groups"]:
        group.update(capturable=True, lr=torch.tensor(0.5))
    second = trainer(params, optimizer="adamw")
    second.load_state_dict(state)
    assert [group["capturable"] for group in second.optimizer.param_groups] == [False, False]
    assert all(group["lr"] == params.train.lr for group in second.optimizer.param_groups)
    assert engine.train_step(second, images, labels, 0.01, 1).isfinite()
    assert all(value["step"] == 2 for value in second.optimizer.state.values())


def test_accumulated_parts_make_the_same_step(params: Params) -> None:
    """For a network without batch norms, whose parts would see statistics of their own."""
    images, labels = batch(8)
    states = []
    for parts in (1, 2, 4):
        state = trainer(params, optimizer="sgd", grad_accumulation=parts, grad_clip=1.0)
        state.model.eval()  # batch norms use their running statistics
        losses = [engine.train_step(state, images, labels, 0.001, step).item() for step in range(3)]
        states.append((losses, list(state.model.parameters())))
    for losses, weights in states[1:]:
        assert losses == pytest.approx(states[0][0], rel=1e-4)
        for a, b in zip(weights, states[0][1], strict=True):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_floating_point_operations_are_counted_on_one_part(params: Params) -> None:
    found, sizes = [], []
    for parts in (1, 4):
        state = trainer(params, grad_accumulation=parts)
        state.model.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
        found.append(profile._flops_per_image(state, *batch(8)))
    assert sizes == [8, 2]
    assert found[0] == found[1] > 0


def test_what_a_step_changes_is_known(params: Params) -> None:
    """CapturedStep puts these tensors back after its warm-up: one that was missed would make a GPU run differ."""
    images, labels = batch()
    state = trainer(params, optimizer="adamw", ema_decay=0.0)
    engine._update(state, images, labels)
    listed = {tensor.data_ptr() for tensor in engine._changing_tensors(state)}
    before = {tensor.data_ptr(): tensor.clone() for tensor in tensors_of(state.state_dict())}
    engine._update(state, images, labels)
    changed = {t.data_ptr() for t in tensors_of(state.state_dict()) if not torch.equal(t, before[t.data_ptr()])}
    assert len(changed) > 10
    assert changed <= listed


def tensors_of(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in tensors_of(value)]
    return [tensor for value in state for tensor in tensors_of(value)] if isinstance(state, list) else []


def test_weights_that_are_no_numbers_are_noticed(params: Params) -> None:
    network = trainer(params).model
    assert engine.is_finite(network)
    with torch.no_grad():
        next(iter(network.parameters()))[0, 0, 0, 0] = float("nan")
    assert not engine.is_finite(network)


def test_an_operation_without_a_deterministic_form_is_told_of(params: Params) -> None:
    expected = r"params\.yaml: model\.name: this network cannot be trained reproducibly on cpu at train\.image_size \d+"
    with pytest.raises(InputError, match=expected), engine.step_errors(params.train, CPU, lambda: "at step 0"):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
