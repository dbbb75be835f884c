"""A training session: how far it is, what it records, and how it is saved, stopped and taken up again."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stages.core.checkpoint import CheckpointStore
from stages.core.distributed import World
from stages.core.engine import Trainer, check_losses, is_finite
from stages.core.errors import InputError, Stopped
from stages.core.optim import learning_rate
from stages.core.recipe import TrainParams
from stages.core.runtime import RuntimeParams
from stages.core.stopping import StopRequest
from stages.core.tracking import NoTracker, Tracker

# What a process wishes between two steps. All processes do what the largest wish is.
_NOTHING, _SAVE, _STOP = 0, 1, 2


@dataclass
class Session:
    """What changes from step to step, and what that is written to."""

    params: TrainParams
    runtime: RuntimeParams
    steps_per_epoch: int
    trainer: Trainer
    store: CheckpointStore
    world: World
    stop: StopRequest
    tracker: Tracker | NoTracker = field(default_factory=NoTracker)
    epoch: int = 0  # being trained, or trained and to be validated
    step: int = 0  # optimizer steps made
    losses: list[Tensor] = field(default_factory=list)  # of the steps since the last record, on the device
    _saved_at: float = field(default_factory=time.monotonic)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.params.epochs * self.steps_per_epoch

    @property
    def epoch_end(self) -> int:
        """Optimizer steps at the end of the present epoch."""
        return (self.epoch + 1) * self.steps_per_epoch

    @property
    def last_loss(self) -> float:
        """The training loss that was recorded last; 0 before the first record."""
        records = (record.metrics for record in reversed(self.tracker.records))
        return next((metrics["train/loss"] for metrics in records if "train/loss" in metrics), 0.0)

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        warmup_steps = round(self.params.warmup_epochs * self.steps_per_epoch)
        return learning_rate(step, self.num_steps, warmup_steps, self.params.lr, self.params.schedule)

    def say(self, line: str) -> None:
        """Print a line, once for all processes."""
        if self.world.writes:
            print(line, flush=True)

    def take_up(self, device: torch.device) -> None:
        """Go to where the newest checkpoint is, if there is one; log again what was logged until then."""
        state = self.world.share_object(self.store.newest() if self.world.writes else None)
        if state is None:
            return
        self.trainer.load_state_dict(state["trainer"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.losses = list(state["losses"].to(device))
        for step, metrics, history in state["records"]:
            self.tracker.log(step, metrics, history)
        self.say(
            f"train: goes on after step {self.step} of {self.num_steps}, from {self.store.folder} "
            "(remove it to start over)"
        )

    def after_step(self, loss: Tensor) -> None:
        """Count a step, record its loss now and then, save where that is due, stop where somebody asks for it."""
        self.losses.append(loss)
        self.step += 1
        if len(self.losses) == self.params.log_every or self.step == self.epoch_end:
            mean_loss = self._check(self.world.mean(torch.stack(self.losses)))
            self.tracker.log(self.step, {"train/loss": mean_loss, "train/lr": self.rate(self.step - 1)})
            self.losses.clear()
        self._follow(self.world.agree(self._wish()))

    def stop_if_asked(self) -> None:
        """Stop where somebody asks for it, after waiting for all processes."""
        self._follow(self.world.agree(_STOP if self.stop else _NOTHING, wait=True))

    def kept(self) -> str:
        """Where the last good checkpoint is, as the end of a message."""
        path = self.store.newest_path()
        return f"; the last good checkpoint is {path}" if path is not None else "; there is no checkpoint yet"

    def _check(self, losses: Tensor) -> float:
        first = self.step - len(losses)
        return check_losses(losses, first, [self.rate(step) for step in range(first, self.step)], self.kept())

    def _wish(self) -> int:
        if self.stop:
            return _STOP
        every, seconds = self.runtime.checkpoint_steps, self.runtime.checkpoint_seconds
        # One clock for all, and it is wound up at once: what several processes agree on is done a step later.
        due = self.world.writes and seconds is not None and time.monotonic() - self._saved_at >= seconds
        if due:
            self._saved_at = time.monotonic()
        return _SAVE if due or (every is not None and self.step % every == 0) else _NOTHING

    def _follow(self, wish: int) -> None:
        if wish == _NOTHING:
            return
        self._save()
        if wish == _STOP:
            reason = self.stop.reason or "stopped, because another process was"
            message = (
                f"{reason}; {self.step} of {self.num_steps} steps are done and saved in {self.store.folder}: run the "
                "same command again (`dvc repro`, `dvc exp run ...`), and training goes on"
            )
            raise Stopped(message if self.world.writes else "", self.stop.signal_number)

    def _save(self) -> None:
        """Write a checkpoint of a healthy run; InputError when the run has diverged since the last record."""
        losses = torch.zeros(0)
        if self.losses:
            losses = self.world.mean(torch.stack(self.losses)).cpu()
            self._check(losses)
        if not is_finite(self.trainer.model):
            raise InputError(f"the weights are no finite numbers after step {self.step}: lower train.lr{self.kept()}")
        if self.world.writes:
            state = {
                "trainer": self.trainer.state_dict(),
                "epoch": self.epoch,
                "step": self.step,
                "losses": losses,
                "records": [tuple(record) for record in self.tracker.records],
            }
            self.store.save(self.step, state)
        self._saved_at = time.monotonic()
