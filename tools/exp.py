"""Run an experiment with presets: recipes and overrides, composed and checked before dvc starts.

    python -m tools.exp --recipe imagenette160 train.lr=0.02 train.epochs=4
    python -m tools.exp --recipe imagenette160,gpu --temp --name one-gpu       recipes are laid over each other
    python -m tools.exp train.lr=0.005,0.01 model.name=resnet18,resnet34       a sweep: four experiments in the queue

What differs from params.yaml goes to `dvc exp run` as `-S section.key=value`; params.yaml keeps its comments and edits.
Values are in Hydra's grammar. With several values of a key (`a,b`, `choice(a,b)`, `range(1,5)`), every combination is
checked and queued, and the queue is started. docs/EXPERIMENTS.md explains.

Exit status: that of dvc; 2 bad input.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hydra.core.override_parser.types import IntervalSweep, Override

from stages.core.errors import InputError, run_main
from stages.core.params import PARAMS_FILE
from tools.shared import dvc_queue
from tools.shared import overrides as settings
from tools.shared.arguments import at_least
from tools.shared.overrides import Settings, Value

_MOST = 1000  # combinations in one call


class Plan(NamedTuple):
    """What dvc is asked for: the settings that differ from params.yaml, and the values of those that are swept."""

    settings: Settings
    sweeps: dict[str, list[Value]]

    @property
    def num_experiments(self) -> int:
        """Combinations of the swept values; 1 where nothing is swept."""
        return math.prod(len(values) for values in self.sweeps.values())

    @property
    def words(self) -> list[str]:
        """The arguments for `dvc exp run`."""
        pairs = [(key, settings.quoted(value)) for key, value in self.settings.items()]
        pairs += [(key, ",".join(map(settings.quoted, values))) for key, values in self.sweeps.items()]
        return [word for key, value in pairs for word in ("-S", f"{key}={value}")]


def plan(recipes: Sequence[str], words: Sequence[str]) -> Plan:
    """Compose and check; InputError names what is wrong and where."""
    names, overrides = settings.parse(words, recipes)
    fixed = {o.key_or_group: settings.plain(o.value()) for o in overrides if not o.is_sweep_override()}
    sweeps = {o.key_or_group: _values(o) for o in overrides if o.is_sweep_override()}
    if twice := fixed.keys() & sweeps.keys():
        raise InputError(f"{', '.join(sorted(twice))}: given as one value and as several; keep one")
    if (count := math.prod(len(values) for values in sweeps.values())) > _MOST:
        raise InputError(
            f"{count:,} combinations; at most {_MOST:,} are queued at once (`make sweep` picks among them)"
        )
    composed = settings.compose_params(names, fixed)
    for values in itertools.product(*sweeps.values()):
        chosen = dict(zip(sweeps, values, strict=True))
        shown = " ".join(f"{key}={settings.quoted(value)}" for key, value in chosen.items())
        where = settings.origin(names, overrides=bool(fixed or sweeps))
        settings.check(settings.changed(composed, chosen), f"{where} ({shown})" if shown else where)
    differing = settings.differences(composed)
    return Plan({key: value for key, value in differing.items() if key not in sweeps}, sweeps)


def _values(override: Override) -> list[Value]:
    if isinstance(override.value(), IntervalSweep):
        raise InputError(
            f"{override.input_line}: an interval has no list of values to queue; let Optuna pick from it: "
            f"python -m tools.sweep {shlex.quote(str(override.input_line))}"
        )
    return settings.swept_values(override)


def main(arguments: argparse.Namespace) -> int:
    """Compose, check, and hand over to dvc."""
    if not (PARAMS_FILE.exists() and Path("dvc.yaml").exists()):
        raise InputError(f"no {PARAMS_FILE} and dvc.yaml here; run this from the root of the repository")
    words = [word for word in arguments.words if "=" in word or word.startswith(("+", "~"))]
    found = plan(arguments.recipe, words)
    queued = arguments.queue or bool(found.sweeps)
    if queued and arguments.temp:
        raise InputError("--temp runs one experiment now; several values of a key go to the queue: leave --temp out")
    command = ["exp", "run", *(["--queue"] if queued else [])]
    command += [f"--{name}" for name in ("temp", "force") if getattr(arguments, name)]
    for option in ("name", "message"):
        command += [f"--{option}", value] if (value := getattr(arguments, option)) else []
    stages = [word for word in arguments.words if word not in words]
    if stages and (queued or arguments.temp):
        stages += dvc_queue.pointers(found.words)
    command += [*found.words, *stages]
    print(f"exp: dvc {shlex.join(command)}", flush=True)
    if arguments.dry:
        return 0
    dvc = [sys.executable, "-m", "dvc", *command]
    if not queued:
        os.execve(dvc[0], dvc, dvc_queue.environment())  # noqa: S606  # nosec B606  # dvc gets the signals, and its status is ours
    status = subprocess.run(dvc, env=dvc_queue.environment()).returncode  # noqa: S603
    if status == 0 and not arguments.queue:
        dvc_queue.start_workers(arguments.jobs, trust=False)
        print(
            f"exp: {found.num_experiments} experiments are run in the background, {arguments.jobs} at a time; "
            "see `dvc queue status`"
        )
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.exp",
        description="Run an experiment with recipes and overrides, composed and checked before dvc starts.",
    )
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="overrides, +recipe=NAME, or stages to stop at")
    parser.add_argument(
        "--recipe", "-r", action="append", default=[], metavar="NAME[,NAME]", help=f"presets in {settings.RECIPES}/"
    )
    parser.add_argument("--temp", action="store_true", help="run in a folder of its own; the workspace stays as it is")
    parser.add_argument("--queue", action="store_true", help="queue only; `dvc queue start` runs it")
    parser.add_argument(
        "--jobs", "-j", type=at_least(1), default=1, help="experiments at a time when several are queued"
    )
    parser.add_argument("--name", "-n", help="of the experiment; several get it with -1, -2, ... behind")
    parser.add_argument("--message", "-m", help="of the experiment's commit")
    parser.add_argument("--force", "-f", action="store_true", help="run stages that did not change too")
    parser.add_argument("--dry", action="store_true", help="check, and print the dvc command only")
    return parser


if __name__ == "__main__":
    run_main(lambda: main(_parser().parse_intermixed_args()), "exp")
