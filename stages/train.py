"""Stage train: train a timm model on the packed set.

Inputs   data/processed/; params `model`, `train`
Outputs  models/classifier/   model.safetensors (averaged weights), model.json (all that using it takes)
         metrics/train/       DVCLive: metrics.json and plots/metrics/**.tsv by step
Command  python -m stages.train
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from stages.core.errors import InputError, run_main
from stages.core.params import Section, load_params
from stages.core.recipe import ModelParams, TrainParams
from stages.core.runtime import RuntimeParams

if TYPE_CHECKING:
    import torch

    from stages.core.dataset import PackMeta, Split
    from stages.core.engine import Trainer
    from stages.core.tracking import Tracker

METRICS = Path("metrics/train")


class Params(Section):
    """What this stage reads."""

    model: ModelParams
    train: TrainParams
    runtime: RuntimeParams


def main(params: Params) -> None:
    """Train, log every few steps and every epoch, save the averaged weights."""
    # Imported here, because torch takes seconds: wrong params are refused before.
    from stages.core import device, engine, model, precision
    from stages.core.dataset import load_meta, load_split
    from stages.core.loader import num_batches
    from stages.core.progress import stage_summary
    from stages.core.tracking import Tracker

    meta = load_meta()
    train_split, val_split = load_split("train", meta), load_split("val", meta)
    num_batches(len(train_split.labels), params.train.batch_size)  # refuses a batch larger than the set
    where = device.set_up(params.runtime)
    policy = precision.resolve(params.train.precision, where)
    network = model.create(params.model, len(meta.classes), params.train.seed)
    trainer = engine.create_trainer(network, params.train, policy, where)

    with stage_summary("train") as made:
        with Tracker(METRICS) as tracker:
            for epoch in range(params.train.epochs):
                start = time.perf_counter()
                loss, num_steps = _train_epoch(trainer, train_split, meta, params.train, epoch, where, tracker)
                seconds = time.perf_counter() - start
                val_loss, val_top1 = _validate(trainer, val_split, meta, params.train, where)
                tracker.log((epoch + 1) * num_steps, {"val/loss": val_loss, "val/top1": val_top1})
                tracker.log((epoch + 1) * num_steps, {"epoch": epoch + 1}, history=False)
                print(
                    f"epoch {epoch + 1}/{params.train.epochs}  loss {loss:.4f}  val loss {val_loss:.4f}  "
                    f"val top-1 {val_top1:.4f}  {num_steps * params.train.batch_size / seconds:,.0f} img/s",
                    flush=True,
                )
        spec = model.ModelSpec(
            architecture=params.model.name.split(".")[0],
            classes=meta.classes,
            class_ids=meta.class_ids,
            image_size=params.train.image_size,
            mean=meta.mean,
            std=meta.std,
        )
        model.save(model.CLASSIFIER, trainer.average.module, spec)
        made.append(f"{params.model.name} on {where} in {policy.dtype}, val top-1 {val_top1:.4f}")


def _train_epoch(
    trainer: Trainer,
    split: Split,
    meta: PackMeta,
    params: TrainParams,
    epoch: int,
    where: torch.device,
    tracker: Tracker,
) -> tuple[float, int]:
    """Run one epoch; returns the mean loss of its last logged steps and the number of steps."""
    import torch

    from stages.core.engine import check_losses, train_step
    from stages.core.loader import num_batches, training_batches
    from stages.core.optim import learning_rate
    from stages.core.progress import progress

    steps_per_epoch = num_batches(len(split.labels), params.batch_size)
    num_steps, warmup_steps = params.epochs * steps_per_epoch, round(params.warmup_epochs * steps_per_epoch)
    torch.manual_seed(params.seed + epoch)  # dropout and the like: an epoch does not depend on those before
    batches = training_batches(split, meta, params, epoch, where, trainer.policy.dtype)
    losses: list[torch.Tensor] = []
    rates: list[float] = []
    mean_loss = 0.0
    first = epoch * steps_per_epoch
    for step, (images, labels) in enumerate(
        progress(batches, f"epoch {epoch + 1}/{params.epochs}", steps_per_epoch, "step"), first
    ):
        rates.append(learning_rate(step, num_steps, warmup_steps, params.lr, params.schedule))
        losses.append(train_step(trainer, images, labels, rates[-1], step))
        if len(losses) == params.log_every or step + 1 == first + steps_per_epoch:
            mean_loss = check_losses(torch.stack(losses), step + 1 - len(losses), rates)
            tracker.log(step + 1, {"train/loss": mean_loss, "train/lr": rates[-1]})
            losses.clear()
            rates.clear()
    return mean_loss, steps_per_epoch


def _validate(
    trainer: Trainer, split: Split, meta: PackMeta, params: TrainParams, where: torch.device
) -> tuple[float, float]:
    """Cross-entropy (nats) and top-1 share of the averaged weights."""
    import torch

    from stages.core.inference import predict
    from stages.core.loader import evaluation_batches

    batches = evaluation_batches(
        split, meta.mean, meta.std, params.image_size, params.batch_size, where, trainer.policy.dtype
    )
    logits = predict(trainer.average.module, batches, trainer.policy)
    labels = torch.from_numpy(split.labels)
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    if loss != loss:
        raise InputError("the validation loss is nan: the run diverged; lower train.lr or set train.grad_clip")
    return loss, (logits.argmax(dim=1) == labels).float().mean().item()


if __name__ == "__main__":
    run_main(lambda: main(load_params(Params)), "train")
