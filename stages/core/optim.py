"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from stages.core.recipe import TrainParams


def create(model: nn.Module, params: TrainParams) -> torch.optim.Optimizer:
    """Timm's AdamW, SGD or Muon (the latter two with Nesterov momentum); no weight decay on biases and norms."""
    choices: dict[str, tuple[str, dict[str, Any]]] = {
        "adamw": ("adamw", {"betas": (params.momentum, 0.999), "fused": True}),
        "sgd": ("sgd", {"momentum": params.momentum, "fused": True}),
        "muon": ("nmuon", {"momentum": params.momentum}),
    }
    name, options = choices[params.optimizer]
    return create_optimizer_v2(model, opt=name, lr=params.lr, weight_decay=params.weight_decay, **options)


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
