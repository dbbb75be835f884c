"""Muon against timm's and against the exact orthogonal factor."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay

from stages.core import muon
from stages.core.muon import Muon, orthogonalise


def matrix(rows: int, columns: int, rank: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if rank is None:
        return torch.randn(rows, columns, generator=generator)
    return torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)


@pytest.mark.parametrize("shape", [(16, 16), (16, 200), (200, 16), (1, 30), (64, 576)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_singular_values_become_one(shape: tuple[int, int], scale: float) -> None:
    values = torch.linalg.svdvals(orthogonalise(scale * matrix(*shape), torch.float32))
    assert values.max() < 1.25
    assert values.median() > 0.7


def test_singular_vectors_stay() -> None:
    """The result is the polar factor of the matrix, up to the error of five iterations."""
    given = matrix(32, 100)
    left, _, right = torch.linalg.svd(given, full_matrices=False)
    rotated = left.T @ orthogonalise(given, torch.float32) @ right.T
    off_diagonal = rotated - torch.diag(rotated.diagonal())
    assert off_diagonal.abs().max() < 1e-4


@pytest.mark.parametrize("rank", [1, 3, 20])
def test_nearly_low_rank_stays_bounded_in_bfloat16(rank: int) -> None:
    """Where rounding would grow without bound if the Gram matrix were not computed anew."""
    given = matrix(128, 1152, rank) + 1e-4 * matrix(128, 1152)
    assert torch.linalg.svdvals(orthogonalise(given, torch.bfloat16).float()).max() < 1.5


def test_a_batch_is_its_matrices() -> None:
    given = torch.stack([matrix(24, 60), matrix(24, 60, rank=3), torch.zeros(24, 60)])
    for one, alone in zip(orthogonalise(given, torch.float32), given, strict=True):
        assert (one - orthogonalise(alone, torch.float32)).abs().max() < 1e-5


def test_zero_stays_zero() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(orthogonalise(torch.zeros(8, 9), dtype), torch.zeros(8, 9, dtype=dtype))


def test_convolutions_move_as_with_timm() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10).to(memory_format=torch.channels_last)
    other = copy.deepcopy(model)
    reference = create_optimizer_v2(model, opt="nmuon", lr=0.01, weight_decay=0.1, momentum=0.95)
    ours = Muon(param_groups_weight_decay(other, 0.1), lr=0.01, weight_decay=0.1, momentum=0.95)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(3):
        for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            twin.grad = parameter.grad.clone()
        reference.step()
        ours.step()
    for start, parameter, twin in zip(before, model.parameters(), other.parameters(), strict=True):
        if parameter.ndim == 4:
            moved = (parameter - start).norm()
            assert (parameter - twin).norm() < 0.02 * moved  # both round to bfloat16, in another order


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bfloat16_is_left_to_hardware_that_has_it(
    has_bf16: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Emulated on a CPU, it takes half a minute for each step of ResNet-18."""
    monkeypatch.setattr(muon, "has_bf16", lambda device: has_bf16)
    weight = torch.nn.Parameter(torch.zeros(24, 60))
    weight.grad = matrix(24, 60)
    Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0).step()
    assert torch.equal(weight, -(orthogonalise(weight.grad, dtype) * (0.2 * 60**0.5)).float())
    assert not torch.equal(
        orthogonalise(weight.grad, torch.float32), orthogonalise(weight.grad, torch.bfloat16).float()
    )


def test_a_rate_in_a_tensor_is_the_same_rate() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    other = copy.deepcopy(model)
    pairs = [(model, Muon(model.parameters(), 0.01, 0.1, 0.9))]
    pairs.append((other, Muon(other.parameters(), torch.tensor(0.01), 0.1, 0.9)))
    for network, optimizer in pairs:
        torch.manual_seed(1)
        for parameter in network.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)
