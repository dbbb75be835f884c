from __future__ import annotations

import math

import pytest
import torch

from stages.core import optim
from stages.core.params import load_params
from stages.core.recipe import TrainParams
from stages.train import Params
from tests.helpers import DEFAULT_PARAMS


def rates(num_steps: int, warmup: int, schedule: str) -> list[float]:
    return [optim.learning_rate(step, num_steps, warmup, 0.1, schedule) for step in range(num_steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decay_agrees_with_torch(schedule: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    reference = (
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
        if schedule == "cosine"
        else torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=50)
    )
    for rate in rates(50, 0, schedule):
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        reference.step()


def test_warm_up_rises_evenly_to_the_peak() -> None:
    found = rates(20, 4, "constant")
    assert found[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert set(found[4:]) == {0.1}
    assert rates(20, 4, "cosine")[4] == pytest.approx(0.1)
    assert rates(20, 4, "cosine")[12] == pytest.approx(0.05 * (1 + math.cos(math.pi / 2)))


@pytest.fixture
def train_params() -> TrainParams:
    return load_params(Params, DEFAULT_PARAMS).train


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_the_optimizer_has_the_params(name: str, train_params: TrainParams) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    params = train_params.model_copy(update={"optimizer": name, "momentum": 0.8, "weight_decay": 0.07})
    optimizer = optim.create(model, params)
    assert type(optimizer).__name__.lower() == name
    decays = {tuple(p.shape): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {(4, 4): 0.07, (4,): 0.0}
    for group in optimizer.param_groups:
        if name == "adamw":
            assert group["betas"][0] == 0.8
        else:
            assert group["momentum"] == 0.8
