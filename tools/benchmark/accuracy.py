"""How much CPU time does an accuracy cost? Whole processes: our pipeline against the plain ImageFolder loop.

    python -m tools.benchmark.accuracy --data imagenette2-160.tgz --recipe imagenette160 --epochs 5 --ours 1,2,3

The plain loop (AdamW with a cosine schedule, float32) trains once for `--epochs`; ours trains with the recipe for each
number of epochs of `--ours`. The cheapest of ours that is as accurate is compared. CPU time is user and system time
of a process and its workers, imports and validation included; ours includes packing the images. Prints a table;
writes benchmarks/accuracy.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.core.errors import InputError, run_main
from stages.core.output import write_json
from stages.core.params import PARAMS_FILE, load_params
from stages.core.runtime import num_cpus
from tools.benchmark import command as benchmark
from tools.report.machine import cpu_name
from tools.shared import overrides
from tools.shared.arguments import at_least

OUT = Path("benchmarks/accuracy.json")
_FIXED = {
    "data.md5": None,
    "data.sha256": None,
    "data.extra": None,
    "data.extra_sha256": None,
    "runtime.cache_dir": "cache",
    "runtime.device": "cpu",
}
_METRICS = Path("metrics/train/metrics.json")
_ACCURACY = Path("plain.json")


def main() -> None:
    """Train both, print the table and write what was measured."""
    options = _parse()
    root = Path.cwd()
    data = Path(options.data).expanduser().absolute()
    if not data.exists():
        raise InputError(f"--data: {options.data}: no such file or folder")
    params = overrides.compose_one(options.settings, options.recipe, _FIXED | {"data.source": str(data)})
    from tools.benchmark.measurements import write_files

    with benchmark.temporary_directory():
        _write_params(params)
        packing = _cpu_seconds(lambda: _run_stages(root, "extract", "preprocess"))
        print(f"benchmark: {packing:,.0f} CPU seconds to unpack and pack the images", flush=True)
        ours = []
        for epochs in options.ours:
            params["train"]["epochs"] = epochs
            _write_params(params)
            seconds = packing + _cpu_seconds(lambda: _run_stages(root, "train"))
            top1 = json.loads(_METRICS.read_text())["val"]["top1"]
            ours.append({"epochs": epochs, "cpu_seconds": seconds, "top1": top1})
            print(f"benchmark: ours {_words(ours[-1])}", flush=True)
        write_files()
        params["train"]["epochs"] = options.epochs
        _write_params(params)
        seconds = _cpu_seconds(_plain_in_a_process)
        plain = {"epochs": options.epochs, "cpu_seconds": seconds, "top1": json.loads(_ACCURACY.read_text())["top1"]}
    print(f"benchmark: the plain loop {_words(plain)}", flush=True)
    print(verdict(ours, plain))
    report = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_name(), "num_cpus": num_cpus(), "python": platform.python_version()},
        "settings": {"data": data.name, "params": params},
        "ours": ours,
        "plain": plain,
    }
    write_json(OUT, report)


def verdict(ours: Sequence[dict[str, Any]], plain: dict[str, Any]) -> str:
    """A table of all runs, and how many times less CPU time the first of ours that is as accurate took."""
    rows = [("plain ImageFolder loop", plain), *(("ours", run) for run in ours)]
    lines = ["| | train.epochs | top-1 | CPU seconds |", "|---|---|---|---|"]
    lines += [f"| {name} | {run['epochs']} | {run['top1']:.4f} | {run['cpu_seconds']:,.0f} |" for name, run in rows]
    as_good = [run for run in ours if run["top1"] >= plain["top1"]]
    if not as_good:
        return "\n".join([*lines, "", "None of ours is as accurate as the plain loop: more epochs in --ours"])
    cheapest = min(as_good, key=lambda run: float(run["cpu_seconds"]))
    ratio = plain["cpu_seconds"] / cheapest["cpu_seconds"]
    return "\n".join(
        [*lines, "", f"Ours is as accurate with train.epochs={cheapest['epochs']}, in {ratio:.2f} times less CPU time"]
    )


def _words(run: dict[str, Any]) -> str:
    return f"with train.epochs={run['epochs']}: top-1 {run['top1']:.4f}, {run['cpu_seconds']:,.0f} CPU seconds"


def _cpu_seconds(work: Callable[[], object]) -> float:
    """User and system time of the processes that `work` runs and waits for, and of theirs."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _run_stages(root: Path, *stages: str) -> None:
    """Run stages in the working directory, with the code of the repository."""
    for stage in stages:
        command = [sys.executable, "-m", f"stages.{stage}"]
        if code := subprocess.run(command, env=os.environ | {"PYTHONPATH": str(root)}).returncode:  # noqa: S603
            raise InputError(f"stage {stage} ended with {code}")


def _plain_in_a_process() -> None:
    process = multiprocessing.get_context("spawn").Process(target=_plain)
    process.start()
    process.join()
    if process.exitcode:
        raise InputError(f"the plain loop ended with {process.exitcode}")


def _plain() -> None:
    """Train the plain loop as params.yaml says, and leave its accuracy in a file."""
    from stages.core import device
    from stages.core.runtime import num_workers
    from tools.benchmark.baseline import PlainLoop
    from tools.benchmark.measurements import FILES

    params = load_params(benchmark.Params)
    recipe = params.train.model_copy(update=benchmark.PLAIN_RECIPE)
    where = device.set_up(params.runtime)
    loop = PlainLoop(FILES / "train", params.model.name, recipe, where, num_workers(params.runtime))
    loop.fit(recipe.epochs)
    write_json(_ACCURACY, {"top1": loop.accuracy(FILES / "val")})


def _write_params(params: dict[str, Any]) -> None:
    with PARAMS_FILE.open("w") as file:
        YAML(typ="safe", pure=True).dump(params, file)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmark.accuracy", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--data", required=True, help="archive or folder with train/<class>/*, val/<class>/*")
    parser.add_argument("--recipe", help="a preset of recipes/ over params.yaml")
    parser.add_argument("--epochs", type=at_least(1), default=5, help="of the plain loop (5)")
    parser.add_argument("--ours", type=_counts, default=[1, 2, 3], metavar="N,N", help="of ours (1,2,3)")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="over params.yaml and the recipe")
    return parser.parse_args()


def _counts(text: str) -> list[int]:
    return [at_least(1)(word) for word in text.split(",")]


if __name__ == "__main__":
    run_main(main, "benchmark.accuracy")
