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
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override
from ruamel.yaml import YAML

from stages.core.closure import code_hash
from stages.core.errors import InputError, run_main
from stages.core.params import PARAMS_FILE
from stages.core.stopping import stop_requests
from tools.shared import commands, dvc_queue
from tools.shared import overrides as settings
from tools.shared.arguments import at_least
from tools.sweep import study as studies
from tools.sweep.study import Direction, Question
from tools.sweep.trials import Sweep

_SMALLER_IS_BETTER = (
    *("loss", "nll", "ece", "error", "differen", "alarm"),
    *("ms", "seconds", "wait", "memory", "size", "flops"),
)


def main(arguments: argparse.Namespace) -> int:
    """Open the study, try, report."""
    if not (PARAMS_FILE.exists() and Path("dvc.yaml").exists()):
        raise InputError(f"no {PARAMS_FILE} and dvc.yaml here; run this from the root of the repository")
    recipes, overrides = settings.parse(arguments.words, arguments.recipe)
    fixed = {o.key_or_group: settings.plain(o.value()) for o in overrides if not o.is_sweep_override()}
    base = settings.compose_params(recipes, fixed)
    where = settings.origin(recipes)
    space = {o.key_or_group: studies.distribution(o, _typed(base, o)) for o in overrides if o.is_sweep_override()}
    if not space:
        raise InputError("nothing to search; name a range, as in 'train.lr=tag(log,interval(0.001,0.1))'")
    if twice := fixed.keys() & space.keys():
        raise InputError(f"{', '.join(sorted(twice))}: fixed and searched; keep one")
    if arguments.workers < 1 or arguments.trials < 1:
        raise InputError("--workers and --trials are at least 1")
    studies.check_space(base, space, where)
    direction = arguments.direction or direction_of(arguments.metric)
    question = Question(recipes, fixed, space, arguments.metric, direction, code_of_stages())
    name = arguments.study or question.default_name()
    if not name.replace("-", "").replace("_", "").isalnum():
        raise InputError(f"--study {name}: letters, digits, - and _ only (it names the experiments)")
    if arguments.devices is None:
        arguments.devices = gpus() if base["runtime"]["device"] in ("auto", "cuda") else []
    for device in arguments.devices:
        settings.check(settings.changed(base, {"runtime.device": device}), "--devices")
    if arguments.seed >= 2**31:
        raise InputError(f"--seed: {arguments.seed} must be below {2**31}")
    measures = stage_of(question.metric.partition(":")[0])
    target = arguments.target or measures
    if not reaches(target, measures):
        raise InputError(f"--target: {target} ends before {measures}, which writes {question.metric}; leave it out")
    check_metric(question.metric)
    is_new = not (studies.FOLDER / name / "study.db").exists()
    with locked(name) as lock, stop_requests() as stop:
        check_queue(name, is_new)
        study = studies.open_study(name, question, base, arguments.seed, arguments.startup)
        sweep = Sweep(arguments, study, question, target, lock)
        print(f"sweep: study {name}, {len(studies.counted(study))} of {arguments.trials} trials are there", flush=True)
        sweep.run(stop)
        return sweep.report()


def check_queue(name: str, is_new: bool) -> None:
    """InputError where what is in dvc's queue keeps a study from beginning, or from going on."""
    ours = re.compile(rf"{re.escape(name)}-\d+")
    others = [
        other
        for other, state in dvc_queue.listed().items()
        if state in ("Queued", "Running")
        and (is_new or not ours.fullmatch(other))
        and not dvc_queue.is_lost(other, state)
    ]
    if others:
        raise InputError(
            f"the queue holds other experiments ({', '.join(others[:3])}), which this sweep's workers would run too; "
            "let them end (dvc queue start) or remove them (dvc queue remove) first"
        )
    if not is_new:
        return
    if old := sorted(filter(ours.fullmatch, dvc_queue.experiments(f"{name}-[0-9]*"))):
        raise InputError(
            f"experiments of an earlier study {name} are here ({', '.join(old[:3])}), but not its record; "
            f"use another --study, or remove them (dvc exp remove {' '.join(old[:3])} ...)"
        )
    dvc_queue.forget(name)


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


def code_of_stages() -> str:
    """Hash of the source of all stages, which is what trials run."""
    modules = re.findall(r"\bpython -m (stages\.\w+)", Path("dvc.yaml").read_text(encoding="utf-8"))
    return code_hash(Path(), modules)


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


def reaches(target: str, stage: str) -> bool:
    """Whether running the pipeline up to `target` runs `stage`; InputError where there is no such target."""
    return f'"{stage}"' in commands.dvc("dag", "--dot", target)


def _typed(base: Mapping[str, Any], override: Override) -> settings.Value:
    """A key's value in `base`, as a float where it is written as an integer and a fraction would do as well."""
    key, swept = override.key_or_group, override.value()
    current = settings.flat(base)[key]
    if isinstance(current, int) and not isinstance(current, bool) and isinstance(swept, IntervalSweep):
        within = float(swept.start or 0) + (float(swept.end or 0) - float(swept.start or 0)) / math.pi
        with suppress(InputError):
            settings.check(settings.changed(base, {key: within}), key)
            return float(current)
    return current


def check_metric(metric: str) -> None:
    """InputError for a key that the workspace's run lacks: a misspelt one must not cost a trial."""
    path, _, key = metric.partition(":")
    if Path(path).exists():
        dvc_queue.number_in(Path(path).read_text(), key, metric)


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
        count = len(re.findall(r"^GPU \d+:", shown, flags=re.MULTILINE))  # "Laptop GPU" is in some names
    else:
        count = 0
    return [f"cuda:{i}" for i in range(count)]


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
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the proposals (0)")
    parser.add_argument("--startup", type=at_least(0), default=3, help="complete trials before any is pruned (3)")
    parser.add_argument("--no-prune", dest="prune", action="store_false", help="let every trial run to its end")
    parser.add_argument("--target", metavar="STAGE", help="run the pipeline up to it; default: what makes the metric")
    parser.add_argument(
        "--devices", type=lambda text: text.split(","), help="one a worker, as cuda:0,cuda:1; default: all GPUs"
    )
    return parser


def run() -> None:
    """The body of the process."""
    run_main(lambda: main(_parser().parse_intermixed_args()), "sweep")
