"""The train step: what train runs, and what profile and the benchmark measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from stages.core import ema, optim
from stages.core.capture import CapturedStep
from stages.core.ema import NoAverage
from stages.core.errors import InputError, ran_out_of_memory
from stages.core.precision import Policy
from stages.core.recipe import TrainParams


@dataclass
class Trainer:
    """All that a train step changes."""

    model: nn.Module
    network: nn.Module  # what a step calls: the model, or the model wrapped for several processes
    optimizer: torch.optim.Optimizer
    average: ModelEmaV3 | NoAverage
    scaler: torch.amp.GradScaler
    loss: nn.Module
    policy: Policy
    grad_clip: float | None
    grad_accumulation: int
    captured: CapturedStep | None = field(default=None)

    @property
    def recording_seconds(self) -> float:
        """Time that recording the step took so far; it is not part of training's speed."""
        return self.captured.seconds if self.captured is not None else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on: tensors and plain values."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        if isinstance(self.average, ModelEmaV3):
            state["average"] = self.average.module.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`, be it of another device; before the first step only."""
        self.model.load_state_dict(state["model"])
        # Whether a CUDA graph holds the step is this trainer's own matter: then the rate is a tensor. torch looks at
        # `capturable` while it loads.
        groups = [
            saved | {key: own[key] for key in ("lr", "capturable") if key in own}
            for saved, own in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True)
        ]
        self.optimizer.load_state_dict(state["optimizer"] | {"param_groups": groups})
        self.scaler.load_state_dict(state["scaler"])
        if isinstance(self.average, ModelEmaV3):
            self.average.module.load_state_dict(state["average"])


def create_trainer(
    model: nn.Module,
    params: TrainParams,
    policy: Policy,
    device: torch.device,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> Trainer:
    """Put the model on the device and everything around it that training needs.

    `wrap` may return a module that averages gradients over processes. Without one, a CUDA device runs the step as a
    CUDA graph, except in float16, whose gradient scaling reads from the device.
    """
    model = model.to(device).to(memory_format=torch.channels_last).train()
    network = wrap(model)
    capture = device.type == "cuda" and network is model and not policy.scale_gradients
    trainer = Trainer(
        model=model,
        network=network,
        optimizer=optim.create(model, params, capturable=capture),
        average=ema.create(model, params.ema_decay),
        scaler=torch.amp.GradScaler(device.type, enabled=policy.scale_gradients),
        loss=nn.CrossEntropyLoss(label_smoothing=params.label_smoothing),
        policy=policy,
        grad_clip=params.grad_clip,
        grad_accumulation=params.grad_accumulation,
    )
    if capture:
        trainer.captured = CapturedStep(
            lambda images, labels: _update(trainer, images, labels), lambda: _changing_tensors(trainer)
        )
    return trainer


def train_step(trainer: Trainer, images: Tensor, labels: Tensor, learning_rate: float, step: int) -> Tensor:
    """One optimizer step on images (B, 3, H, W) and labels (B,); returns the loss (0-d, on the device, not synced)."""
    optim.set_learning_rate(trainer.optimizer, learning_rate)
    loss = trainer.captured(images, labels) if trainer.captured is not None else _update(trainer, images, labels)
    trainer.average.update(trainer.model, step + 1)
    return loss


def _update(trainer: Trainer, images: Tensor, labels: Tensor) -> Tensor:
    """Forward, backward, in `grad_accumulation` equal parts, and the optimizer's step; the mean loss."""
    trainer.optimizer.zero_grad(set_to_none=True)
    num_parts = trainer.grad_accumulation
    total: Tensor | None = None
    for part, (some_images, some_labels) in enumerate(
        zip(images.chunk(num_parts), labels.chunk(num_parts), strict=True)
    ):
        with _without_averaging(trainer.network) if part + 1 < num_parts else nullcontext():
            with trainer.policy.autocast(images.device):
                logits = trainer.network(some_images)
            loss: Tensor = trainer.loss(logits.float(), some_labels) / num_parts
            trainer.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        total = loss.detach() if total is None else total + loss.detach()
    if trainer.grad_clip is not None:
        trainer.scaler.unscale_(trainer.optimizer)
        nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.grad_clip)
    trainer.scaler.step(trainer.optimizer)
    trainer.scaler.update()
    assert total is not None
    return total


def _without_averaging(network: nn.Module) -> AbstractContextManager[None]:
    """Gradients are averaged over the processes in the last part only."""
    if isinstance(network, nn.parallel.DistributedDataParallel):
        return network.no_sync()
    return nullcontext()


def _changing_tensors(trainer: Trainer) -> list[Tensor]:
    """What `_update` changes: parameters, buffers and the optimizer's state."""
    states = (value for state in trainer.optimizer.state.values() for value in state.values())
    return [
        *trainer.model.parameters(),
        *trainer.model.buffers(),
        *(value for value in states if isinstance(value, Tensor)),
    ]


def check_losses(losses: Tensor, first_step: int, learning_rates: list[float], kept: str = "") -> float:
    """Mean of the losses (n,) of consecutive steps; InputError naming the first step whose loss is not finite.

    `kept` says where the last good checkpoint is.
    """
    values = losses.cpu()
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        i = int(bad[0])
        raise InputError(
            f"the loss is {values[i].item()} at step {first_step + i}, learning rate {learning_rates[i]:.3g}: the run "
            f"diverged; lower train.lr, lengthen train.warmup_epochs or set train.grad_clip{kept}"
        )
    return float(values.mean())


def is_finite(model: nn.Module) -> bool:
    """Whether every weight and buffer is a finite number."""
    values = [value for value in model.state_dict().values() if value.is_floating_point()]
    return bool(torch.stack([value.isfinite().all() for value in values]).all())


@contextmanager
def step_errors(params: TrainParams, device: torch.device, when: Callable[[], str]) -> Iterator[None]:
    """InputError, with what to change, when memory runs out or a part of the batch is too small for batch norms.

    The same when an operation of the network has no deterministic form on the device. `when()` says in the message how
    far the run was.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            f"params.yaml: train.batch_size: {params.batch_size}: batch normalisation needs more than one image at a "
            "time: use at least 2, in each part and process"
        ) from None
    except RuntimeError as error:
        if "does not have a deterministic implementation" in str(error):
            raise InputError(
                f"params.yaml: model.name: this network cannot be trained reproducibly on {device} at train.image_size "
                f"{params.image_size}: {str(error).split(',')[0]}; choose another one, another size or the CPU"
            ) from None
        if not ran_out_of_memory(error):
            raise
        raise InputError(
            f"out of memory on {device} {when()} with train.batch_size {params.batch_size} and train.image_size "
            f"{params.image_size}: set train.grad_accumulation to {2 * params.grad_accumulation} (the step in smaller "
            "parts; batch norms see one part at a time), lower train.batch_size or train.image_size, or set "
            "runtime.resident to false"
        ) from None
