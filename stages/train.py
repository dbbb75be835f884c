"""Stage train: train a timm model on the packed set.

Inputs   data/processed/; params `model`, `train`
Outputs  models/classifier/   model.safetensors (averaged weights), model.json (all that using it takes)
         metrics/train/       DVCLive: metrics.json and plots/metrics/**.tsv by step
Beside   checkpoints under runtime.cache_dir, from which a run that was killed goes on (docs/TRAINING.md)
Command  python -m stages.train   (or torchrun ... -m stages.train)
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.errors import InputError, run_main
from stages.core.mirror import NoMirror, WandbParams, open_mirror
from stages.core.params import Section, load_params
from stages.core.recipe import ModelParams, TrainParams
from stages.core.runtime import RuntimeParams, cache_dir, num_readers

if TYPE_CHECKING:
    import torch

    from stages.core.dataset import PackMeta
    from stages.core.distributed import World
    from stages.core.loader import Source
    from stages.core.mirror import Mirror
    from stages.core.session import Session
    from stages.core.stopping import StopRequest

METRICS = Path("metrics/train")


class Params(Section):
    """What this stage reads."""

    model: ModelParams
    train: TrainParams
    runtime: RuntimeParams
    wandb: WandbParams


def main(params: Params) -> None:
    """Train, log every few steps and every epoch, save the averaged weights."""
    from stages.core.stopping import stop_requests

    # Imported here, because torch takes seconds: wrong params are refused before. An interrupt in the middle of its
    # import comes out as some other error, so it waits.
    with stop_requests() as early:
        from stages.core import device, distributed
    if early:
        raise KeyboardInterrupt(early.reason, early.signal_number)

    num_processes = device.num_processes(params.runtime)
    if num_processes > 1 and not distributed.is_worker():
        distributed.launch("stages.train", num_processes)
        return
    where = device.set_up(params.runtime, distributed.local_rank(), distributed.local_count())
    with stop_requests() as stop, distributed.world(where) as world:
        _train(params, where, world, stop)


def _train(params: Params, where: torch.device, world: World, stop: StopRequest) -> None:
    from stages.core import distributed, loader, model
    from stages.core.dataset import load_meta, load_split
    from stages.core.progress import stage_summary
    from stages.core.tracking import Tracker

    meta = load_meta()
    splits = {name: load_split(name, meta) for name in ("train", "val")}
    # Refuses a batch larger than the set.
    steps_per_epoch = loader.num_batches(len(splits["train"].labels), params.train.batch_size)
    session = _open_session(params, meta, steps_per_epoch, where, world, stop)
    readers = num_readers(params.runtime, distributed.local_count())
    train, val = (loader.open_source(split, where, params.runtime.resident, readers) for split in splits.values())
    with ExitStack() as stack:
        made: list[str] = []
        mirror: Mirror | NoMirror = NoMirror()
        if world.writes:
            made = stack.enter_context(stage_summary("train"))
            stack.enter_context(session.store.locked())
            group = f"train-{session.store.folder.name[:12]}"
            if params.train.image_size > meta.image_size:
                print(
                    f"train: train.image_size: {params.train.image_size} is more than the packed images have, which "
                    f"are enlarged; for sharp ones set preprocess.image_size (now {meta.image_size}) to at least that",
                    file=sys.stderr,
                )
            where_to = cache_dir(params.runtime)
            mirror = stack.enter_context(open_mirror("train", params.wandb, where_to, params, group=group))
            session.tracker = stack.enter_context(Tracker(METRICS, mirror))
        session.take_up(where)
        while session.epoch < params.train.epochs:
            speed = _train_epoch(session, train, meta)
            val_loss, val_top1 = _validate(session, val, meta)
            session.tracker.log(session.step, {"val/loss": val_loss, "val/top1": val_top1})
            session.tracker.log(session.step, {"epoch": session.epoch + 1}, history=False)
            session.epoch += 1
            session.say(
                f"epoch {session.epoch}/{params.train.epochs}  loss {session.last_loss:.4f}  val loss {val_loss:.4f}  "
                f"val top-1 {val_top1:.4f}  {speed:,.0f} img/s"
            )
        if world.writes:
            spec = model.ModelSpec(
                architecture=params.model.name.split(".")[0],
                classes=meta.classes,
                class_ids=meta.class_ids,
                image_size=params.train.image_size,
                mean=meta.mean,
                std=meta.std,
            )
            model.save(model.CLASSIFIER, session.trainer.average.module, spec)
            mirror.model(model.CLASSIFIER)
            session.store.remove()
        made.append(f"{params.model.name} on {world.describe()} in {session.trainer.policy.dtype}")
        made.append(f"val top-1 {val_top1:.4f}")


def _open_session(
    params: Params, meta: PackMeta, steps_per_epoch: int, where: torch.device, world: World, stop: StopRequest
) -> Session:
    """Make the model and name the checkpoints; nothing is written yet."""
    import timm
    import torch

    from stages.core import engine, loader, model, precision
    from stages.core.batchnorm import share_statistics
    from stages.core.checkpoint import CheckpointStore, fingerprint
    from stages.core.output import sha256_of
    from stages.core.session import Session

    params.train.share(world.shard.num_shards)  # refuses a batch that does not divide
    policy = precision.resolve(params.train.precision, where, params.train.smallest_side)
    network = model.create(params.model, len(meta.classes), params.train.seed)
    sizes = loader.input_sizes(params.train)
    # What halves an image five times or six takes all other multiples of 16 if it takes the first few.
    model.check_takes(network, params.model.name, sorted({*sizes[:5], sizes[-1]}))
    if world.shard.num_shards > 1:
        network = share_statistics(network, where)
    weights = params.model.weights
    facts: dict[str, Any] = {
        "model": params.model.model_dump(),
        "train": params.train.model_dump(),
        "data": meta.model_dump(),
        "weights": None if weights is None else sha256_of(Path(weights).expanduser()),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "device": where.type,
        "dtype": str(policy.dtype),
        "has_bf16": precision.has_bf16(where),  # Muon computes in it whatever the policy
    }
    key = fingerprint("stages.train", facts, Path(__file__).parent.parent)
    world.check_same("params, data or code", key)
    return Session(
        params=params.train,
        runtime=params.runtime,
        steps_per_epoch=steps_per_epoch,
        trainer=engine.create_trainer(network, params.train, policy, where, world.wrap),
        store=CheckpointStore(cache_dir(params.runtime), key),
        world=world,
        stop=stop,
    )


def _train_epoch(session: Session, source: Source, meta: PackMeta) -> float:
    """Train to the end of the epoch; returns images per second."""
    from stages.core import device
    from stages.core.engine import step_errors, train_step
    from stages.core.keyed import seed_for
    from stages.core.loader import training_batches
    from stages.core.progress import progress

    params, world, trainer, where = session.params, session.world, session.trainer, source.device
    first = session.step - session.epoch * session.steps_per_epoch
    batches = training_batches(source, meta, params, trainer.policy.dtype, session.epoch, first, world.shard)
    if world.writes:
        what = f"epoch {session.epoch + 1}/{params.epochs}"
        batches = progress(batches, what, session.epoch_end - session.step, "step")
    start, start_step, recorded = time.perf_counter(), session.step, trainer.recording_seconds
    with step_errors(params, where, lambda: f"at step {session.step}"):
        for images, labels in batches:
            # Dropout and the like: a step does not depend on those before.
            device.seed(where, seed_for(params.seed, session.step, world.shard.rank))
            session.after_step(train_step(trainer, images, labels, session.rate(session.step), session.step))
    device.synchronize(where)
    seconds = time.perf_counter() - start - (trainer.recording_seconds - recorded)
    return (session.step - start_step) * params.batch_size / seconds


def _validate(session: Session, source: Source, meta: PackMeta) -> tuple[float, float]:
    """Cross-entropy (nats) and top-1 share of the averaged weights, in batches as large as a part of a train step."""
    import torch

    from stages.core.engine import step_errors
    from stages.core.inference import predict
    from stages.core.loader import evaluation_batches

    params, trainer, shard = session.params, session.trainer, session.world.shard
    batch_size = params.share(shard.num_shards) // params.grad_accumulation
    batches = evaluation_batches(
        source, meta.mean, meta.std, params.image_size, batch_size, trainer.policy.dtype, shard
    )
    with step_errors(params, source.device, lambda: f"in the validation after step {session.step}"):
        part = predict(trainer.average.module, takewhile(lambda _: not session.stop, batches), trainer.policy)
    session.stop_if_asked()
    logits = session.world.gather(part)
    labels = torch.from_numpy(source.split.labels)
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    if loss != loss:
        raise InputError(
            f"the validation loss is nan: the run diverged; lower train.lr or set train.grad_clip{session.kept()}"
        )
    return loss, (logits.argmax(dim=1) == labels).float().mean().item()


if __name__ == "__main__":
    run_main(lambda: main(load_params(Params)), "train")
