"""The train step: what train runs and profile measures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from stages.core import ema, optim
from stages.core.ema import NoAverage
from stages.core.errors import InputError
from stages.core.precision import Policy
from stages.core.recipe import TrainParams


@dataclass
class Trainer:
    """All that a train step changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: ModelEmaV3 | NoAverage
    scaler: torch.amp.GradScaler
    loss: nn.Module
    policy: Policy
    grad_clip: float | None


def create_trainer(model: nn.Module, params: TrainParams, policy: Policy, device: torch.device) -> Trainer:
    """Put the model on the device and everything around it that training needs."""
    model = model.to(device).to(memory_format=torch.channels_last).train()
    return Trainer(
        model=model,
        optimizer=optim.create(model, params),
        average=ema.create(model, params.ema_decay),
        scaler=torch.amp.GradScaler(device.type, enabled=policy.scale_gradients),
        loss=nn.CrossEntropyLoss(label_smoothing=params.label_smoothing),
        policy=policy,
        grad_clip=params.grad_clip,
    )


def train_step(trainer: Trainer, images: Tensor, labels: Tensor, learning_rate: float, step: int) -> Tensor:
    """One optimizer step on images (B, 3, H, W) and labels (B,); returns the loss (0-d, on the device, not synced)."""
    for group in trainer.optimizer.param_groups:
        group["lr"] = learning_rate
    with trainer.policy.autocast(images.device):
        logits = trainer.model(images)
    loss: Tensor = trainer.loss(logits.float(), labels)
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    if trainer.grad_clip is not None:
        trainer.scaler.unscale_(trainer.optimizer)
        nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.grad_clip)
    trainer.scaler.step(trainer.optimizer)
    trainer.scaler.update()
    trainer.average.update(trainer.model, step + 1)
    return loss.detach()


def check_losses(losses: Tensor, first_step: int, learning_rates: list[float]) -> float:
    """Mean of the losses (n,) of consecutive steps; InputError naming the first step whose loss is not finite."""
    values = losses.cpu()
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        i = int(bad[0])
        raise InputError(
            f"the loss is {values[i].item()} at step {first_step + i}, learning rate {learning_rates[i]:.3g}: the run "
            "diverged; lower train.lr, lengthen train.warmup_epochs or set train.grad_clip"
        )
    return float(values.mean())
