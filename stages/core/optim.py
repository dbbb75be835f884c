"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from stages.core.muon import Muon
from stages.core.recipe import TrainParams


def create(model: nn.Module, params: TrainParams, capturable: bool = False) -> torch.optim.Optimizer:
    """AdamW, SGD or Muon (the latter two with Nesterov momentum); no weight decay on biases and norms.

    `capturable`: the learning rate and the step count are tensors on the device, so that a CUDA graph can hold a step.
    """
    choices: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
        "adamw": (torch.optim.AdamW, {"betas": (params.momentum, 0.999), "fused": True, "capturable": capturable}),
        "sgd": (torch.optim.SGD, {"momentum": params.momentum, "nesterov": params.momentum > 0, "fused": True}),
        "muon": (Muon, {"momentum": params.momentum}),
    }
    optimizer, options = choices[params.optimizer]
    groups = param_groups_weight_decay(model, params.weight_decay)
    rate: float | Tensor = params.lr
    if capturable:
        rate = torch.tensor(params.lr, dtype=torch.float32, device=next(model.parameters()).device)
    return optimizer(groups, lr=rate, weight_decay=params.weight_decay, **options)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all groups, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def learning_rate(step: int, num_steps: int, warmup_steps: int, peak: float, schedule: str) -> float:
    """Learning rate of step 0 <= step < num_steps: linear warm-up to `peak`, then cosine or linear to 0, or constant.

    The warm-up's first step has peak / (warmup_steps + 1), so that no step is wasted at 0.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return peak
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * (0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done)
