"""How fast is tools.predict, beside PyTorch with the same model and images? Whole processes, timed in one run.

    python -m tools.benchmark.predict               the validation images of data/raw
    python -m tools.benchmark.predict IMAGES --rounds 5 --repeat 3

The contenders take turns, round after round, so that a busy machine slows all of them. Start-up is the time of a
process that predicts one image; images per second is what all the others take beyond it. The same in CPU
seconds, which a busy machine changes less; with one thread they are what a free core would take. Prints a table; writes
benchmarks/predict.json (every round). docs/PREDICT.md shows results.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from stages.core.errors import InputError, run_main
from stages.core.output import write_json
from stages.core.production import find_images
from stages.core.runtime import num_cpus
from tools.report.machine import cpu_name

OURS, BASELINE = "onnxruntime", "torch fp32"
CONTENDERS = {
    OURS: ["tools.predict"],
    BASELINE: ["tools.benchmark.torch_predict"],
    "torch bf16": ["tools.benchmark.torch_predict", "--precision", "bf16"],
}
OUT = Path("benchmarks/predict.json")


def main() -> None:
    """Measure, print the table and write every round."""
    options = _parse()
    files = find_images([options.images])
    contenders = {name: words for name, words in CONTENDERS.items() if name != "torch bf16" or _has_bf16()}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        one = Path(scratch) / "one.jpg"
        one.write_bytes(files[0].read())
        rounds = []
        for number in range(options.rounds + 1):
            measured = {name: _measure(words, str(one), options) for name, words in contenders.items()}
            if _disagreements(measured):
                raise InputError("the contenders predict different classes: run `dvc repro export`")
            if number:  # the first round fills the disk cache
                rounds.append({name: times for name, (times, _) in measured.items()})
    num_images = len(files) * options.repeat
    results = {name: _summary([each[name] for each in rounds], num_images) for name in contenders}
    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {"cpu": _cpu(), "num_cpus": num_cpus(), "load": os.getloadavg()[0]},
        "settings": {"num_images": num_images, "rounds": options.rounds, "threads": options.threads},
        "results": results,
    }
    write_json(OUT, report)
    print(f"{_cpu()}, {options.threads} threads, {options.rounds} rounds of {num_images:,} images")
    print(table(results))


class Times(NamedTuple):
    """Wall and CPU seconds of a process with one image, and of one with all of them."""

    start: float
    whole: float
    start_cpu: float
    whole_cpu: float


def _measure(words: list[str], one: str, options: argparse.Namespace) -> tuple[Times, list[str]]:
    """The times of both processes, and the classes that the second gave."""
    command = [sys.executable, "-m", *words, "--threads", str(options.threads)]
    seconds, cpu_seconds, said = [], [], ""
    for places in ([one], [options.images] * options.repeat):
        start, cpu_before = time.perf_counter(), os.times()
        ended = subprocess.run([*command, *places], capture_output=True, text=True)  # noqa: S603
        seconds.append(time.perf_counter() - start)
        cpu = os.times()
        cpu_seconds.append(cpu[2] + cpu[3] - cpu_before[2] - cpu_before[3])  # of the processes that have ended
        if ended.returncode:
            raise InputError(f"`python -m {words[0]}` failed: {ended.stderr.strip()}")
        said = ended.stdout
    return Times(*seconds, *cpu_seconds), [row["class"] for row in csv.DictReader(said.splitlines())]


def _disagreements(measured: dict[str, tuple[Times, list[str]]]) -> int:
    """Images whose class differs between the contenders of full precision."""
    return sum(a != b for a, b in zip(measured[OURS][1], measured[BASELINE][1], strict=True))


def _summary(rounds: list[Times], num_images: int) -> dict[str, Any]:
    others = num_images - 1
    columns = {
        "start_s": [times.start for times in rounds],
        "images_per_second": [others / max(times.whole - times.start, 1e-3) for times in rounds],
        "start_cpu_s": [times.start_cpu for times in rounds],
        "images_per_cpu_second": [others / max(times.whole_cpu - times.start_cpu, 1e-3) for times in rounds],
    }
    return {name: {"median": statistics.median(values), "rounds": values} for name, values in columns.items()}


def table(results: dict[str, Any]) -> str:
    """Medians, and the lowest and highest of the rounds, for people."""
    lines = [
        "| | start-up, one image (s) | images per second | start-up (CPU s) | images per CPU second |",
        "|---|---|---|---|---|",
    ]
    for name, row in results.items():
        cells = []
        for key, numbers in row.items():
            digits = ".2f" if key.startswith("start") else ",.0f"
            low, high = min(numbers["rounds"]), max(numbers["rounds"])
            cells.append(f"{numbers['median']:{digits}} ({low:{digits}} to {high:{digits}})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _has_bf16() -> bool:
    import torch

    from stages.core import precision

    return precision.has_bf16(torch.device("cpu"))


def _cpu() -> str:
    return f"{num_cpus()} CPUs ({cpu_name()})"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmark.predict", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("images", nargs="?", default="data/raw/val.tar", metavar="IMAGES", help="data/raw/val.tar")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds that count (5)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="times that all images are predicted (3)")
    parser.add_argument("--threads", type=int, default=num_cpus(), metavar="N", help="CPU threads (all)")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main, "benchmark.predict")
