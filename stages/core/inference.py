"""The prediction pass: what evaluation, validation during training and prediction run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from stages.core.precision import Policy


@torch.inference_mode()
def predict(model: nn.Module, batches: Iterable[Tensor], policy: Policy) -> Tensor:
    """Logits float32 (N, num_classes) on the CPU of batches (B, 3, H, W), the model in evaluation mode.

    Without any batch: (0,).
    """
    was_training = model.training
    model.eval()
    logits = []
    for images in batches:
        with policy.autocast(images.device):
            logits.append(model(images).float())
    model.train(was_training)
    return torch.cat(logits).cpu() if logits else torch.zeros(0)
