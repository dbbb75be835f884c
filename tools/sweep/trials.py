"""The trials of a sweep: proposed by the study, run by DVC's queue, looked at while they run, and told to the study."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from optuna.trial import Trial, TrialState

from stages.core.errors import InputError, Stopped
from stages.core.output import write_bytes, write_text
from stages.core.runtime import num_cpus
from stages.core.stopping import StopRequest
from tools.shared import dvc_queue
from tools.shared import overrides as settings
from tools.shared.overrides import Settings
from tools.sweep import report as study_report
from tools.sweep import study as studies
from tools.sweep.study import Direction, Question

_EPOCHS: dict[Direction, Path] = {  # by epoch, of the same direction as the metric
    "maximize": Path("metrics/train/plots/metrics/val/top1.tsv"),
    "minimize": Path("metrics/train/plots/metrics/val/loss.tsv"),
}
_POLL_SECONDS = 1.0
_NUDGE_SECONDS = 20.0  # a task that still waits: the last daemon may have ended just when it came
_MOST_UNLISTED = 2  # while a daemon takes a task, dvc may list it nowhere for a moment
_STOP_SECONDS = 120.0  # for stages to save and end
_KILL_SECONDS = 20.0  # and then, for dvc to see that they were killed


@dataclass
class Run:
    """A trial whose experiment is in the queue."""

    trial: Trial
    name: str
    slot: int
    before: bytes  # the epochs' file of the workspace, which the experiment's folder starts with
    num_epochs: int = 0
    pruned: bool = False
    nudged: float = field(default_factory=time.monotonic)
    unlisted: int = 0  # times in a row that dvc did not know it


class Sweep:
    """A study and what of it is running."""

    def __init__(
        self, arguments: argparse.Namespace, study: optuna.Study, question: Question, target: str, lock: int
    ) -> None:
        self.arguments, self.study, self.question, self.target, self.lock = arguments, study, question, target, lock
        self.name: str = study.study_name
        metric_file, _, key = question.metric.partition(":")
        self.metric_file, self.metric_key = metric_file, key
        self.epochs = _EPOCHS[question.direction]
        self.active: list[Run] = []

    def run(self, stop: StopRequest) -> None:
        """Try until there are as many trials as asked for; Stopped when somebody asks for it."""
        self._take_up()
        while not stop:
            while not stop and len(self.active) < self.arguments.workers and self._wanted() > 0:
                self._start()
            if not self.active:
                return
            self.active = [run for run in self.active if not self._settled(run)]
            time.sleep(_POLL_SECONDS)
        self._stop_all()
        raise Stopped(f"{stop.reason}; run the same command again, and the study goes on", stop.signal_number)

    def _wanted(self) -> int:
        return int(self.arguments.trials) - len(studies.counted(self.study)) - len(self.active)

    def _take_up(self) -> None:
        """What a killed sweep left running goes on where its daemon lives or has ended it; else it is tried again."""
        if not (left := studies.broken_off(self.study)):
            return
        known = dvc_queue.experiments(f"{self.name}-*").keys() | {
            name for name, state in dvc_queue.listed().items() if state in ("Queued", "Running")
        }
        for trial in left:
            name = experiment_name(self.name, trial)
            if name in known and dvc_queue.look(name).state != "lost":  # dvc lists it as running
                print(f"sweep: {name} was left running and is taken up", flush=True)
                run = Run(trial, name, trial.user_attrs.get("slot", 0), _content(self.epochs))
                run.num_epochs = len(self.study.trials[trial.number].intermediate_values)
                run.pruned = trial.user_attrs.get("pruned", False)
                self.active.append(run)
            else:
                print(f"sweep: {name} was broken off and is tried again", flush=True)
                studies.give_up(self.study, trial, "the sweep was killed", again=True)

    def _start(self) -> None:
        slot = min(set(range(self.arguments.workers)) - {run.slot for run in self.active}, default=0)
        trial = self.study.ask(self.question.space)
        name = experiment_name(self.name, trial)
        chosen = {key: studies.value_of(key, value, self.question.space) for key, value in trial.params.items()}
        share = self._share(slot)
        base = settings.compose_params(self.question.recipes, self.question.fixed)
        params = settings.changed(base, chosen | share)
        try:
            settings.check(params, name)
        except InputError as error:
            studies.give_up(self.study, trial, str(error))
            print(f"sweep: {name} is not run: {error}", flush=True)
            return
        differing = settings.differences(params)
        words = [word for key, value in differing.items() for word in ("-S", f"{key}={settings.quoted(value)}")]
        trial.set_user_attr("slot", slot)
        run = Run(trial, name, slot, _content(self.epochs))
        try:
            dvc_queue.queue(name, words, self.target, self.lock)
            self.active.append(run)
            dvc_queue.start_workers(self.arguments.workers)
            run.nudged = time.monotonic()  # both may have taken a while
        except InputError as error:
            studies.give_up(self.study, trial, str(error), again=True)
            self.active = [other for other in self.active if other is not run]
            self._stop_all()
            raise
        shown = " ".join(f"{key}={settings.quoted(value)}" for key, value in (chosen | share).items())
        print(f"sweep: {name} is queued: {shown}", flush=True)

    def _share(self, slot: int) -> Settings:
        """A worker's part of the machine."""
        devices, workers = self.arguments.devices, self.arguments.workers
        chosen = self.question.fixed.keys() | self.question.space.keys()
        if devices and "runtime.device" not in self.question.space:
            return {"runtime.device": devices[slot % len(devices)]}
        if workers == 1 or "runtime.threads" in chosen:
            return {}
        return {"runtime.threads": max(1, num_cpus() // workers)}

    def _settled(self, run: Run) -> bool:
        """Look at a run: report its epochs, stop it when it is not promising, record its end."""
        task = dvc_queue.look(run.name)
        if task.state == "succeeded":
            commit = dvc_queue.experiments(run.name)[run.name]
            # Those that ended between two looks, for the trials that are compared with it.
            for epoch, measured in list(enumerate(by_epoch(dvc_queue.file_of(commit, str(self.epochs)))))[
                run.num_epochs :
            ]:
                run.trial.report(measured, epoch)
            value = dvc_queue.number_in(
                dvc_queue.file_of(commit, self.metric_file), self.metric_key, self.question.metric
            )
            self.study.tell(run.trial, value)
            print(f"sweep: {run.name} ended: {self.metric_key} {value:.4f}", flush=True)
        elif task.state in ("failed", "lost") and run.pruned:
            self.study.tell(run.trial, state=TrialState.PRUNED)
        elif task.state == "failed":
            studies.give_up(self.study, run.trial, reason := dvc_queue.reason(task.log))
            print(f"sweep: {run.name} failed: {reason}", flush=True)
        elif task.state == "lost":
            studies.give_up(self.study, run.trial, "its dvc was killed", again=True)
            print(f"sweep: {run.name}: its dvc was killed; it is tried again", flush=True)
        elif time.monotonic() - run.nudged > _NUDGE_SECONDS and (task.state == "waiting" or run.pruned):
            run.nudged = time.monotonic()
            if run.pruned:
                dvc_queue.stop(run.name)
            elif self._left_the_queue(run):
                return True
            else:
                dvc_queue.start_workers(self.arguments.workers, trust=False)
        elif task.state == "running" and task.folder is not None and not run.pruned:
            self._report_epochs(run, task.folder)
        return task.state in ("succeeded", "failed", "lost")

    def _left_the_queue(self, run: Run) -> bool:
        """Give up a run that waits and will never begin."""
        listed_as = dvc_queue.listed().get(run.name, "")
        run.unlisted = 0 if listed_as else run.unlisted + 1
        if dvc_queue.is_lost(run.name, listed_as):
            studies.give_up(self.study, run.trial, "a daemon of dvc took it, and ended", again=True)
            print(f"sweep: {run.name} was taken by a daemon of dvc that was just ending; it is tried again", flush=True)
        elif run.unlisted >= _MOST_UNLISTED:
            studies.give_up(self.study, run.trial, "it was taken off dvc's queue")
            print(f"sweep: {run.name} was taken off dvc's queue", flush=True)
        else:
            return False
        return True

    def _report_epochs(self, run: Run, folder: Path) -> None:
        content = _content(folder / self.epochs)
        if content == run.before:
            return
        for epoch, value in list(enumerate(by_epoch(content.decode())))[run.num_epochs :]:
            run.trial.report(value, epoch)
            run.num_epochs = epoch + 1
            if self.arguments.prune and run.trial.should_prune():
                print(f"sweep: {run.name} is pruned after epoch {epoch + 1} ({value:.4f})", flush=True)
                run.pruned, run.nudged = True, time.monotonic()
                run.trial.set_user_attr("pruned", True)
                dvc_queue.stop(run.name)
                return

    def _stop_all(self) -> None:
        """End what is running; it is tried again by the next call, from its checkpoint."""
        if self.active:
            print(f"sweep: stopping {', '.join(run.name for run in self.active)}", flush=True)
        start = time.monotonic()
        asked: set[str] = set()
        while (going_on := self._going_on()) and time.monotonic() - start < _STOP_SECONDS + _KILL_SECONDS:
            late = time.monotonic() - start > _STOP_SECONDS
            for name in going_on:
                # Once: a stage may take a while to save.
                if (late or name not in asked) and dvc_queue.stop(name, kill=late):
                    asked.add(name)
            time.sleep(_POLL_SECONDS)
        for run in self.active:
            if not self._is_told(run):
                studies.give_up(self.study, run.trial, "the sweep was interrupted", again=True)
        dvc_queue.remove([run.name for run in self.active])
        self.active = []

    def _going_on(self) -> list[str]:
        """The experiments of ours that run, those that wait taken off the queue.

        A daemon that has just taken one makes its folder first: only dvc, which is slow to ask, knows that it runs.
        """
        states = {run.name: dvc_queue.look(run.name).state for run in self.active}
        running = [name for name, state in states.items() if state == "running"]
        waiting = [name for name, state in states.items() if state == "waiting"]
        if running or not waiting:
            return running
        dvc_queue.remove(waiting)
        return [
            name
            for name, state in dvc_queue.listed().items()
            if name in waiting and state in ("Queued", "Running") and not dvc_queue.is_lost(name, state)
        ]

    def _is_told(self, run: Run) -> bool:
        """Whether it had ended on its own when we came to stop it."""
        return dvc_queue.look(run.name).state == "succeeded" and self._settled(run)

    def report(self) -> int:
        """Print and write the table and the picture; 1 when no trial has a result."""
        trials = self.study.get_trials(deepcopy=False)
        folder = studies.FOLDER / self.name
        dvc_queue.remove([experiment_name(self.name, t) for t in trials if t.state is TrialState.PRUNED])
        for trial in trials:
            if trial.user_attrs.get("interrupted"):
                dvc_queue.clear(experiment_name(self.name, trial))
        metric, direction = self.metric_key, self.question.direction
        print(study_report.table(trials, self.name, metric))
        if not trials:
            return 1
        write_text(folder / "trials.csv", study_report.csv(trials, self.name, metric))
        if (best := studies.best(trials, direction)) is None:
            print("sweep: no trial has a result; the reasons are in the table above", flush=True)
            return 1
        write_bytes(folder / "study.png", study_report.picture(self.study, metric, direction))
        print(f"sweep: {folder}/trials.csv and study.png are written; {len(studies.counted(self.study))} trials")
        print(f"sweep: the best is {self.name}-{best.number} with {metric} {best.value:.4f}")
        print(f"sweep: to take it over (its run ended with {self.target}; dvc repro does the rest):\n")
        print(f"  dvc exp apply {self.name}-{best.number} && dvc repro")
        return 0


def experiment_name(study: str, trial: Trial | optuna.trial.FrozenTrial) -> str:
    """The DVC experiment of a trial."""
    return f"{study}-{trial.number}"


def by_epoch(text: str) -> list[float]:
    """The second column of a DVCLive table, without a line that is being written."""
    return [float(line.split("\t")[1]) for line in text.splitlines(keepends=True)[1:] if line.endswith("\n")]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return b""
