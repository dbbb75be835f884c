"""Exponential moving average of the weights: what is validated and saved."""

from __future__ import annotations

from timm.utils import ModelEmaV3
from torch import nn


class NoAverage:
    """Stands in when averaging is off: the average is the model itself."""

    def __init__(self, model: nn.Module) -> None:
        self.module = model

    def update(self, model: nn.Module, step: int) -> None:
        """Nothing to do."""


def create(model: nn.Module, decay: float) -> ModelEmaV3 | NoAverage:
    """Average of parameters and buffers with timm's warm-up of the decay; `decay` 0 switches it off."""
    if decay == 0:
        return NoAverage(model)
    return ModelEmaV3(model, decay=decay, use_warmup=True)
