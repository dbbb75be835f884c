"""Search for good settings: Optuna proposes, DVC's experiment queue runs, several at a time.

    python -m tools.sweep 'train.lr=tag(log,interval(0.001,0.1))' 'model.name=choice(resnet18,resnet34)' \
        --trials 8 --workers 2 [--recipe NAME]

Search spaces are in Hydra's grammar; one value for a key fixes it. A trial that is worse than the median at the same
epoch is stopped. Every trial is a DVC experiment; the study is kept in sweeps/NAME: the same command takes it up again.
It ends with a table (trials.csv), a picture (study.png) and the command that applies the best. docs/EXPERIMENTS.md
explains.

Exit status: 0 there is a best trial; 1 no trial has a result; 2 bad input; 130 interrupted, 143
terminated (trials are stopped).
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from optuna.trial import Trial, TrialState
from ruamel.yaml import YAML

from stages.core.errors import InputError, Stopped, run_main
from stages.core.output import write_bytes, write_text
from stages.core.params import PARAMS_FILE
from stages.core.runtime import num_cpus
from stages.core.stopping import StopRequest, stop_requests
from tools import dvc_queue, study_report
from tools import overrides as settings
from tools import study as studies
from tools.overrides import Settings
from tools.study import Direction, Question

_EPOCHS: dict[Direction, Path] = {  # by epoch, of the same direction as the metric
    "maximize": Path("metrics/train/plots/metrics/val/top1.tsv"),
    "minimize": Path("metrics/train/plots/metrics/val/loss.tsv"),
}
_SMALLER_IS_BETTER = ("loss", "nll", "ece", "error", "ms", "seconds", "memory")
_POLL_SECONDS = 1.0
_NUDGE_SECONDS = 20.0  # a task that still waits: the last daemon may have ended just when it came
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


class Sweep:
    """A study and what of it is running."""

    def __init__(
        self, arguments: argparse.Namespace, study: optuna.Study, question: Question, target: str, lock: int
    ) -> None:
        self.arguments, self.study, self.question, self.target, self.lock = arguments, study, question, target, lock
        self.name: str = study.study_name
        metric_file, _, key = question.metric.partition(":")
        self.metric_file, self.metric_key = metric_file, key.split(".")
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
        if devices:
            return {"runtime.device": devices[slot % len(devices)]}
        if workers == 1 or "runtime.threads" in self.question.fixed:
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
            print(f"sweep: {run.name} ended: {self.metric_key[-1]} {value:.4f}", flush=True)
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
            else:
                dvc_queue.start_workers(self.arguments.workers, trust=False)
        elif task.state == "running" and task.folder is not None and not run.pruned:
            self._report_epochs(run, task.folder)
        return task.state in ("succeeded", "failed", "lost")

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
            name for name, state in dvc_queue.listed().items() if name in waiting and state in ("Queued", "Running")
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
        metric, direction = self.metric_key[-1], self.question.direction
        print(study_report.table(trials, self.name, metric))
        if not trials:
            return 1
        write_text(folder / "trials.csv", study_report.csv(trials, self.name, metric))
        if (best := studies.best(trials, direction)) is None:
            print("sweep: no trial has a result; the reasons are in the table above", flush=True)
            return 1
        write_bytes(folder / "study.png", study_report.picture(self.study, metric, direction))
        print(f"sweep: {folder}/trials.csv and study.png are written; {len(studies.counted(self.study))} trials")
        print(f"sweep: the best is {self.name}-{best.number} with {metric} {best.value:.4f}; this makes it yours:\n")
        print(f"  dvc exp apply {self.name}-{best.number}")
        return 0


def main(arguments: argparse.Namespace) -> int:
    """Open the study, try, report."""
    if not (PARAMS_FILE.exists() and Path("dvc.yaml").exists()):
        raise InputError(f"no {PARAMS_FILE} and dvc.yaml here; run this from the root of the repository")
    recipes, overrides = settings.parse(arguments.words, arguments.recipe)
    fixed = {o.key_or_group: settings.plain(o.value()) for o in overrides if not o.is_sweep_override()}
    base = settings.compose_params(recipes, fixed)
    where = settings.origin(recipes)
    current = settings.flat(base)
    space = {
        o.key_or_group: studies.distribution(o, current[o.key_or_group]) for o in overrides if o.is_sweep_override()
    }
    if not space:
        raise InputError("nothing to search; name a range, as in 'train.lr=tag(log,interval(0.001,0.1))'")
    if twice := fixed.keys() & space.keys():
        raise InputError(f"{', '.join(sorted(twice))}: fixed and searched; keep one")
    if arguments.workers < 1 or arguments.trials < 1:
        raise InputError("--workers and --trials are at least 1")
    studies.check_space(base, space, where)
    question = Question(recipes, fixed, space, arguments.metric, arguments.direction or direction_of(arguments.metric))
    name = arguments.study or question.default_name()
    if not name.replace("-", "").replace("_", "").isalnum():
        raise InputError(f"--study {name}: letters, digits, - and _ only (it names the experiments)")
    if arguments.devices is None:
        arguments.devices = gpus() if current["runtime.device"] in ("auto", "cuda") else []
    target = arguments.target or stage_of(question.metric.partition(":")[0])
    check_metric(question.metric)
    is_new = not (studies.FOLDER / name / "study.db").exists()
    with locked(name) as lock, stop_requests() as stop:
        _check_queue(name, is_new)
        study = studies.open_study(name, question, base, arguments.seed, arguments.startup)
        sweep = Sweep(arguments, study, question, target, lock)
        print(f"sweep: study {name}, {len(studies.counted(study))} of {arguments.trials} trials are there", flush=True)
        sweep.run(stop)
        return sweep.report()


def _check_queue(name: str, is_new: bool) -> None:
    listed = dvc_queue.listed()
    others = [n for n, s in listed.items() if s in ("Queued", "Running") and not n.startswith(f"{name}-")]
    if others:
        raise InputError(
            f"the queue holds other experiments ({', '.join(others[:3])}), which this sweep's workers would run too; "
            "let them end (dvc queue start) or remove them (dvc queue remove) first"
        )
    if is_new and (old := dvc_queue.experiments(f"{name}-[0-9]*")):
        raise InputError(
            f"experiments of an earlier study {name} are here ({', '.join(sorted(old)[:3])}), but not its record; "
            f"use another --study, or remove them (dvc exp remove {' '.join(sorted(old)[:3])} ...)"
        )


@contextmanager
def locked(name: str) -> Iterator[int]:
    """Hold the study; waits for a dvc that a killed sweep left queueing. Yields the lock's descriptor."""
    (studies.FOLDER / name).mkdir(parents=True, exist_ok=True)
    with (studies.FOLDER / name / "lock").open("a") as file:
        deadline = time.monotonic() + 30
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise InputError(f"study {name} is being worked on by another process") from None
                time.sleep(0.5)
        yield file.fileno()


def experiment_name(study: str, trial: Trial | optuna.trial.FrozenTrial) -> str:
    """The DVC experiment of a trial."""
    return f"{study}-{trial.number}"


def stage_of(metric_file: str) -> str:
    """The stage that writes a metrics file; InputError when none does, or git does not keep it."""
    stages = YAML(typ="safe", pure=True).load(Path("dvc.yaml"))["stages"]
    known: dict[str, str] = {}
    for stage, content in stages.items():
        for entry in content.get("metrics", ()):
            path, options = next(iter(entry.items())) if isinstance(entry, dict) else (entry, {})
            if options.get("cache", True) is False:
                known[path] = stage
    if metric_file not in known:
        raise InputError(f"--metric {metric_file}: not a metrics file of dvc.yaml that git keeps ({', '.join(known)})")
    return known[metric_file]


def check_metric(metric: str) -> None:
    """InputError for a key that the workspace's run lacks: a misspelt one must not cost a trial."""
    path, _, key = metric.partition(":")
    if Path(path).exists():
        dvc_queue.number_in(Path(path).read_text(), key.split("."), metric)


def direction_of(metric: str) -> Direction:
    """Whether less is better, by the metric's name."""
    return "minimize" if any(word in metric.split(":")[-1].lower() for word in _SMALLER_IS_BETTER) else "maximize"


def gpus() -> list[str]:
    """The NVIDIA GPUs that a process here may use, as values of runtime.device."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        count = len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    elif shutil.which("nvidia-smi"):
        shown = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout  # noqa: S607
        count = shown.count("GPU ")
    else:
        count = 0
    return [f"cuda:{i}" for i in range(count)]


def by_epoch(text: str) -> list[float]:
    """The second column of a DVCLive table, without a line that is being written."""
    return [float(line.split("\t")[1]) for line in text.splitlines(keepends=True)[1:] if line.endswith("\n")]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return b""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.sweep", description="Search for good settings with Optuna and DVC's experiment queue."
    )
    parser.add_argument(
        "words", nargs="+", metavar="KEY=SPACE", help="interval(), range(), choice() or a,b; or a value"
    )
    parser.add_argument(
        "--recipe", "-r", action="append", default=[], metavar="NAME[,NAME]", help="presets in recipes/"
    )
    parser.add_argument("--trials", type=int, default=20, help="of the study in all, earlier calls' included (20)")
    parser.add_argument("--workers", "-j", type=int, default=1, help="experiments at a time (1)")
    parser.add_argument("--metric", default="metrics/evaluate.json:top1", metavar="FILE:KEY", help="what is best")
    parser.add_argument("--direction", choices=("maximize", "minimize"), help="default: by the metric's name")
    parser.add_argument("--study", metavar="NAME", help="default: made from what is searched")
    parser.add_argument("--seed", type=int, default=0, help="of the proposals (0)")
    parser.add_argument("--startup", type=int, default=3, help="complete trials before any is pruned (3)")
    parser.add_argument("--no-prune", dest="prune", action="store_false", help="let every trial run to its end")
    parser.add_argument("--target", metavar="STAGE", help="run the pipeline up to it; default: what makes the metric")
    parser.add_argument(
        "--devices", type=lambda text: text.split(","), help="one a worker, as cuda:0,cuda:1; default: all GPUs"
    )
    return parser


if __name__ == "__main__":
    run_main(lambda: main(_parser().parse_intermixed_args()), "sweep")
