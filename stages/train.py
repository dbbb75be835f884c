"""Stage train: train a timm model on the packed set.

Inputs   data/processed/; params `model`, `train`
Outputs  models/classifier/   model.safetensors (averaged weights), model.json (all that using it takes)
         metrics/train/       DVCLive: metrics.json and plots/metrics/**.tsv by step
Beside   checkpoints under runtime.cache_dir, from which a run that was killed goes on (docs/TRAINING.md)
Command  python -m stages.train   (or torchrun ... -m stages.train)
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.errors import InputError, Stopped, run_main
from stages.core.params import Section, load_params
from stages.core.recipe import ModelParams, TrainParams
from stages.core.runtime import RuntimeParams, cache_dir, num_workers

if TYPE_CHECKING:
    import torch

    from stages.core.checkpoint import CheckpointStore
    from stages.core.dataset import PackMeta
    from stages.core.distributed import World
    from stages.core.engine import Trainer
    from stages.core.loader import Source
    from stages.core.stopping import StopRequest
    from stages.core.tracking import NoTracker, Tracker

METRICS = Path("metrics/train")

NOTHING, SAVE, STOP = 0, 1, 2  # what a process wishes between two steps; the largest wish is what all do


class Params(Section):
    """What this stage reads."""

    model: ModelParams
    train: TrainParams
    runtime: RuntimeParams


@dataclass
class Run:
    """A training run: what it works with, and how far it is."""

    params: Params
    meta: PackMeta
    train: Source
    val: Source
    trainer: Trainer
    tracker: Tracker | NoTracker
    store: CheckpointStore
    world: World
    stop: StopRequest
    steps_per_epoch: int
    epoch: int = 0  # being trained, or to be validated
    step: int = 0  # optimizer steps made
    losses: list[torch.Tensor] = field(default_factory=list)  # of the steps since the last record
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.params.train.epochs * self.steps_per_epoch


def main(params: Params) -> None:
    """Train, log every few steps and every epoch, save the averaged weights."""
    # Imported here, because torch takes seconds: wrong params are refused before.
    from stages.core import device, distributed, model
    from stages.core.progress import stage_summary
    from stages.core.stopping import stop_requests

    num_processes = device.num_processes(params.runtime)
    if num_processes > 1 and not distributed.is_worker():
        distributed.launch("stages.train", num_processes)
        return
    where = device.set_up(params.runtime, distributed.local_rank(), distributed.local_count())
    with stop_requests() as stop, distributed.world(where) as world:
        run = _prepare(params, where, world, stop)
        speaks: AbstractContextManager[list[str]] = stage_summary("train") if world.writes else nullcontext([])
        with speaks as made, run.store.locked() if world.writes else nullcontext(), _tracker(run):
            _go_on(run)
            while run.epoch < params.train.epochs:
                loss, speed = _train_epoch(run)
                val_loss, val_top1 = _validate(run)
                run.tracker.log(run.step, {"val/loss": val_loss, "val/top1": val_top1})
                run.tracker.log(run.step, {"epoch": run.epoch + 1}, history=False)
                run.epoch += 1
                _say(
                    run,
                    f"epoch {run.epoch}/{params.train.epochs}  loss {loss:.4f}  val loss {val_loss:.4f}  "
                    f"val top-1 {val_top1:.4f}  {speed:,.0f} img/s",
                )
            if world.writes:
                spec = model.ModelSpec(
                    architecture=params.model.name.split(".")[0],
                    classes=run.meta.classes,
                    class_ids=run.meta.class_ids,
                    image_size=params.train.image_size,
                    mean=run.meta.mean,
                    std=run.meta.std,
                )
                model.save(model.CLASSIFIER, run.trainer.average.module, spec)
                run.store.remove()
            made.append(f"{params.model.name} on {_places(run, where)} in {run.trainer.policy.dtype}")
            made.append(f"val top-1 {val_top1:.4f}")


def _prepare(params: Params, where: torch.device, world: World, stop: StopRequest) -> Run:
    """Open the data, make the model and name the checkpoints; nothing is written yet."""
    import torch

    from stages.core import engine, loader, model, precision
    from stages.core.batchnorm import share_statistics
    from stages.core.checkpoint import CheckpointStore, fingerprint
    from stages.core.dataset import load_meta, load_split
    from stages.core.tracking import NoTracker

    meta = load_meta()
    splits = {name: load_split(name, meta) for name in ("train", "val")}
    # Refuses a batch larger than the set.
    steps_per_epoch = loader.num_batches(len(splits["train"].labels), params.train.batch_size)
    num_parts = world.shard.num_shards * params.train.grad_accumulation
    if params.train.batch_size % num_parts:
        raise InputError(
            f"params.yaml: train.batch_size: {params.train.batch_size} does not divide into {world.shard.num_shards} "
            f"processes with train.grad_accumulation {params.train.grad_accumulation}: use a multiple of {num_parts}"
        )
    policy = precision.resolve(params.train.precision, where)
    network = model.create(params.model, len(meta.classes), params.train.seed)
    several = world.shard.num_shards > 1
    if several:
        network = share_statistics(network, where)
    trainer = engine.create_trainer(network, params.train, policy, where, world.wrap if several else None)
    facts: dict[str, Any] = {
        "model": params.model.model_dump(),
        "train": params.train.model_dump(),
        "data": meta.model_dump(),
        "torch": torch.__version__,
        "device": where.type,
        "dtype": str(policy.dtype),
    }
    key = fingerprint("stages.train", facts, Path(__file__).parent.parent)
    world.check_same("params, data or code", key)
    threads = num_workers(params.runtime)
    return Run(
        params=params,
        meta=meta,
        train=loader.open_source(splits["train"], where, params.runtime.resident, threads),
        val=loader.open_source(splits["val"], where, params.runtime.resident, threads),
        trainer=trainer,
        tracker=NoTracker(),
        store=CheckpointStore(cache_dir(params.runtime), key),
        world=world,
        stop=stop,
        steps_per_epoch=steps_per_epoch,
    )


def _tracker(run: Run) -> AbstractContextManager[Any]:
    from stages.core.tracking import Tracker

    if not run.world.writes:
        return nullcontext()
    run.tracker = Tracker(METRICS)
    return run.tracker


def _go_on(run: Run) -> None:
    """Take the run to where its newest checkpoint is, if there is one; log again what was logged until then."""
    state = run.world.share_object(run.store.newest() if run.world.writes else None)
    if state is None:
        return
    run.trainer.load_state_dict(state["trainer"])
    run.epoch, run.step = state["epoch"], state["step"]
    run.losses = list(state["losses"].to(run.train.device)) if len(state["losses"]) else []
    for step, metrics, history in state["records"]:
        run.tracker.log(step, metrics, history)
    _say(run, f"goes on after step {run.step} of {run.num_steps}, from {run.store.folder} (remove it to start over)")


def _train_epoch(run: Run) -> tuple[float, float]:
    """Train to the end of the epoch; returns the mean loss of the last record, and images per second."""
    import torch

    from stages.core import device
    from stages.core.engine import check_losses, ran_out_of_memory, train_step
    from stages.core.keyed import seed_for
    from stages.core.loader import training_batches
    from stages.core.progress import progress

    params, world = run.params.train, run.world
    end = (run.epoch + 1) * run.steps_per_epoch
    first = run.step - run.epoch * run.steps_per_epoch
    batches = training_batches(run.train, run.meta, params, run.trainer.policy.dtype, run.epoch, first, world.shard)
    what = f"epoch {run.epoch + 1}/{params.epochs}"
    mean_loss = next((r.metrics["train/loss"] for r in reversed(run.tracker.records) if "train/loss" in r.metrics), 0.0)
    start, start_step, captured = time.perf_counter(), run.step, _capture_seconds(run)
    try:
        for images, labels in progress(batches, what, end - run.step, "step") if world.writes else batches:
            # Dropout and the like: a step does not depend on those before.
            device.seed(run.train.device, seed_for(params.seed, run.step, world.shard.rank))
            run.losses.append(train_step(run.trainer, images, labels, _rate(run, run.step), run.step))
            run.step += 1
            if len(run.losses) == params.log_every or run.step == end:
                mean_loss = check_losses(world.mean(torch.stack(run.losses)), *_recent(run))
                run.tracker.log(run.step, {"train/loss": mean_loss, "train/lr": _rate(run, run.step - 1)})
                run.losses.clear()
            wish = world.agree(_wish(run))
            if wish == STOP:
                _stop(run)
            if wish == SAVE:
                _save(run)
    except RuntimeError as error:
        if world.is_broken_by(error):
            raise ConnectionError(f"another process of this job is gone: {str(error).splitlines()[0][:200]}") from None
        if not ran_out_of_memory(error):
            raise
        raise InputError(
            f"out of memory on {run.train.device} at step {run.step} with train.batch_size {params.batch_size} and "
            f"train.image_size {params.image_size}: set train.grad_accumulation to {2 * params.grad_accumulation} "
            "(the same step in smaller parts), lower train.batch_size or train.image_size, or set runtime.resident to "
            "false"
        ) from None
    device.synchronize(run.train.device)
    seconds = time.perf_counter() - start - (_capture_seconds(run) - captured)
    return mean_loss, (run.step - start_step) * params.batch_size / seconds


def _validate(run: Run) -> tuple[float, float]:
    """Cross-entropy (nats) and top-1 share of the averaged weights."""
    import torch

    from stages.core.inference import predict
    from stages.core.loader import evaluation_batches

    params, meta = run.params.train, run.meta
    batches = evaluation_batches(
        run.val, meta.mean, meta.std, params.image_size, params.batch_size, run.trainer.policy.dtype, run.world.shard
    )
    part = predict(run.trainer.average.module, takewhile(lambda _: not run.stop, batches), run.trainer.policy)
    if run.world.agree(STOP if run.stop else NOTHING, wait=True) == STOP:
        _stop(run)
    logits = run.world.gather(part)
    labels = torch.from_numpy(run.val.split.labels)
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    if loss != loss:
        raise InputError(
            "the validation loss is nan: the run diverged; lower train.lr or set train.grad_clip" + _kept(run)
        )
    return loss, (logits.argmax(dim=1) == labels).float().mean().item()


def _rate(run: Run, step: int) -> float:
    from stages.core.optim import learning_rate

    params = run.params.train
    warmup_steps = round(params.warmup_epochs * run.steps_per_epoch)
    return learning_rate(step, run.num_steps, warmup_steps, params.lr, params.schedule)


def _recent(run: Run) -> tuple[int, list[float], str]:
    """First step and learning rates of the losses not yet recorded, and where the last good checkpoint is."""
    first = run.step - len(run.losses)
    return first, [_rate(run, step) for step in range(first, run.step)], _kept(run)


def _kept(run: Run) -> str:
    path = run.store.newest_path()
    return f"; the last good checkpoint is {path}" if path is not None else "; there is no checkpoint yet"


def _wish(run: Run) -> int:
    """Whether this process wants to write a checkpoint now, or to stop."""
    if run.stop:
        return STOP
    every, seconds = run.params.runtime.checkpoint_steps, run.params.runtime.checkpoint_seconds
    due = seconds is not None and time.monotonic() - run.saved_at >= seconds
    return SAVE if due or (every is not None and run.step % every == 0) else NOTHING


def _save(run: Run) -> None:
    """Write a checkpoint of a healthy run; InputError when the run has diverged since the last record."""
    import torch

    from stages.core.engine import check_losses, is_finite

    losses = run.world.mean(torch.stack(run.losses)).cpu() if run.losses else torch.zeros(0)
    if run.losses:
        check_losses(losses, *_recent(run))
    if not is_finite(run.trainer.model):
        raise InputError(f"the weights are no finite numbers after step {run.step}: lower train.lr{_kept(run)}")
    if run.world.writes:
        state = {
            "trainer": run.trainer.state_dict(),
            "epoch": run.epoch,
            "step": run.step,
            "losses": losses,
            "records": [tuple(record) for record in run.tracker.records],
        }
        run.store.save(run.step, state)
    run.saved_at = time.monotonic()


def _stop(run: Run) -> None:
    """Write a checkpoint and end the run."""
    _save(run)
    message = (
        f"{run.stop.reason or 'another process was stopped'}; {run.step} of {run.num_steps} steps are done and saved "
        f"in {run.store.folder}: run the same command again (`dvc repro`, `dvc exp run ...`), and training goes on"
    )
    raise Stopped(message if run.world.writes else "", run.stop.signal_number)


def _say(run: Run, line: str) -> None:
    if run.world.writes:
        print(line if line.startswith("epoch") else f"train: {line}", flush=True)


def _places(run: Run, where: torch.device) -> str:
    count = run.world.shard.num_shards
    return str(where) if count == 1 else f"{count} x {where.type}"


def _capture_seconds(run: Run) -> float:
    return run.trainer.captured.seconds if run.trainer.captured is not None else 0.0


if __name__ == "__main__":
    run_main(lambda: main(load_params(Params)), "train")
