"""Measure this project against what people write by hand, on this machine, in one run.

    python -m tools.benchmark                              the generated sample at 160 px
    python -m tools.benchmark --data imagenette2-160.tgz   an archive or folder with train/<class>/*, val/<class>/*

Contenders take turns, round after round, so that a busy machine slows all of them; a ratio is one of the same round.
Prints a table; writes benchmarks/latest.json (every round) and benchmarks/latest.png. docs/BENCHMARKS.md explains.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

# torch is imported later: --help and refusals do not wait for it.
from stages.core.errors import InputError, run_main
from stages.core.params import Section, load_params
from stages.core.recipe import ModelParams, TrainParams
from stages.core.runtime import RuntimeParams, num_cpus, num_threads
from tools.report.machine import cpu_name
from tools.shared.arguments import at_least

if TYPE_CHECKING:
    from tools.benchmark.measurements import Setup

PLAIN_RECIPE = {"optimizer": "adamw", "lr": 0.001, "weight_decay": 0.05}  # of the plain loop
PARTS = ("train", "preprocess", "loader", "compute", "dvc")


class Params(Section):
    """What the benchmark takes from params.yaml; the command line sets sizes and counts."""

    model: ModelParams
    train: TrainParams
    runtime: RuntimeParams


@dataclass(frozen=True)
class Comparison:
    """One row of the table: the ratio of two measured numbers."""

    part: str
    name: str
    unit: str
    ours: tuple[str, str]  # what it is, and its key in the measurement
    baseline: tuple[str, str]
    target: float | None = None
    at_most: bool = False  # the target; else at least


COMPARISONS = (
    Comparison("train", "train step", "img/s", ("ours", "ours"), ("plain ImageFolder loop", "plain"), 2.1),
    Comparison("train", "loading in a step", "ms", ("waiting for data", "loading_ms"), ("whole step", "whole_ms")),
    Comparison("loader", "loader alone", "img/s", ("ours", "ours"), ("ImageFolder, workers", "plain")),
    Comparison("preprocess", "preprocess", "img/s", ("ours", "ours"), ("Pillow, one process", "plain"), 3.0),
    Comparison("compute", "share of matmul", "GFLOP/s", ("train step", "ours"), ("matrix product", "matmul")),
    Comparison(
        "compute", "share of convolutions", "GFLOP/s", ("train step", "ours"), ("convolutions", "convolutions"), 0.85
    ),
    Comparison("dvc", "DVC overhead", "s", ("dvc repro, no-op", "ours"), ("dvc status", "plain"), 1.3, at_most=True),
)


def main(arguments: argparse.Namespace) -> None:
    """Prepare the images in a temporary folder, run the rounds, report."""
    root, out = Path.cwd(), Path(arguments.out).absolute()
    parts = arguments.only.split(",") if arguments.only else list(PARTS)
    for part in parts:
        if part not in PARTS:
            raise InputError(f"--only: {part!r} is no part (valid: {', '.join(PARTS)})")
    data = Path(arguments.data).expanduser().absolute() if arguments.data else None
    if data is not None and not data.exists():
        raise InputError(f"--data: {data}: no such file or folder")
    params = load_params(Params)

    from tools.benchmark import measurements

    with temporary_directory():
        setup = _setup(arguments, params, data, root)
        if parts != ["dvc"]:
            setup.prepare()
        measures = {part: measurements.PARTS[part](setup) for part in parts}
        rounds: list[dict[str, dict[str, float]]] = []
        for number in range(1, arguments.rounds + 1):
            rounds.append({part: measure() for part, measure in measures.items()})
            print(f"benchmark: round {number} of {arguments.rounds}", flush=True)
        results = [summarise(row, [r[row.part] for r in rounds]) for row in COMPARISONS if row.part in parts]
        report = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": _machine(setup),
            "settings": {
                "data": data.name if data else "sample",
                "model": setup.model.name,
                "train": setup.train.model_dump(),
                "pack_size": setup.pack.preprocess.image_size,
                "steps": setup.num_steps,
                "quick": setup.quick,
            },
            "results": results,
        }
    print(table(results))
    _write(report, out)


def summarise(row: Comparison, rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Medians of a comparison's rounds, and the median, least and largest ratio."""
    ours, baseline = ([values[key] for values in rounds] for _, key in (row.ours, row.baseline))
    ratios = [a / b for a, b in zip(ours, baseline, strict=True)]
    median = statistics.median(ratios)
    reached = None if row.target is None else median <= row.target if row.at_most else median >= row.target
    return {
        "name": row.name,
        "unit": row.unit,
        "ours": {"what": row.ours[0], "median": statistics.median(ours), "rounds": ours},
        "baseline": {"what": row.baseline[0], "median": statistics.median(baseline), "rounds": baseline},
        "ratio": {"median": median, "min": min(ratios), "max": max(ratios), "rounds": ratios},
        "target": None if row.target is None else {"value": row.target, "at_most": row.at_most, "reached": reached},
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [["", "ours", "baseline", "ratio (median, min to max)", "target"]]
    for row in results:
        sides = [f"{_number(row[k]['median'])} {row['unit']} ({row[k]['what']})" for k in ("ours", "baseline")]
        ratio = row["ratio"]
        lines.append([row["name"], *sides, f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
                      _target(row)])  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))} |" for line in lines)


def _target(row: dict[str, Any]) -> str:
    target = row["target"]
    if target is None:
        return ""
    return f"{'<=' if target['at_most'] else '>='} {target['value']:g}{'' if target['reached'] else ', missed'}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _setup(arguments: argparse.Namespace, params: Params, data: Path | None, root: Path) -> Setup:
    from stages import extract, preprocess
    from tools.benchmark.measurements import Setup

    size = arguments.size or (32 if arguments.quick else 160)
    pack_size = arguments.pack or size
    for option, value in (("--size", size), ("--pack", pack_size)):
        if not 16 <= value <= 512:
            raise InputError(f"{option}: {value} px; valid: 16 to 512")
    batch_size = arguments.batch_size or (20 if arguments.quick else 64)
    recipe = {
        "image_size": size,
        "batch_size": batch_size,
        "grad_accumulation": 1,
        "progressive": None,
        **PLAIN_RECIPE,
    }
    sample = {
        "train_images": 5 * batch_size if arguments.quick else 16 * batch_size,
        "val_images": batch_size,
        "image_size": pack_size,
    }
    from_file = load_params(extract.Params, root / "params.yaml")
    packing = load_params(preprocess.Params, root / "params.yaml")
    source = from_file.data.model_copy(
        update={
            "source": str(data) if data else "sample",
            "md5": None,
            "sha256": None,
            "extra": None,
            "extra_sha256": None,
        }
    )
    return Setup(
        data=from_file.model_copy(update={"data": source, "sample": from_file.sample.model_copy(update=sample)}),
        pack=packing.model_copy(update={"preprocess": packing.preprocess.model_copy(update={"image_size": pack_size})}),
        model=ModelParams(name="test_resnet" if arguments.quick else "resnet18", pretrained=False, weights=None),
        train=params.train.model_copy(update=recipe),
        runtime=params.runtime,
        num_steps=arguments.steps or (2 if arguments.quick else 8),
        root=root,
        quick=arguments.quick,
    )


def _machine(setup: Setup) -> dict[str, Any]:
    import torch

    from stages.core.precision import resolve

    where = setup.device
    return {
        "cpu": cpu_name(),
        "num_cpus": num_cpus(),
        "threads": num_threads(setup.runtime),
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else where.type,
        "dtype": str(resolve(setup.train.precision, where).dtype),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


@contextmanager
def temporary_directory() -> Iterator[None]:
    """Work in a folder that is removed at the end."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="benchmark-", ignore_cleanup_errors=True) as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def _write(report: dict[str, Any], out: Path) -> None:
    from stages.core.output import write_bytes, write_json
    from tools.benchmark.chart import chart

    write_json(out / "latest.json", report)
    write_bytes(out / "latest.png", chart(report))
    print(f"benchmark: {out / 'latest.json'} and {out / 'latest.png'} are written")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmark", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", help="archive or folder with train/<class>/*, val/<class>/*; else a generated sample")
    parser.add_argument("--only", help=f"parts to measure, separated by commas: {','.join(PARTS)}")
    parser.add_argument("--size", type=at_least(1), help="side in pixels of the network's input (160)")
    parser.add_argument("--pack", type=at_least(1), help="side in pixels of the packed images (as --size)")
    parser.add_argument("--batch-size", type=at_least(1), help="images a step (64)")
    parser.add_argument("--rounds", type=at_least(1), default=5, help="rounds of all contenders (5)")
    parser.add_argument("--steps", type=at_least(1), help="training steps of a contender in a round (8)")
    parser.add_argument("--out", default="benchmarks", help="folder for latest.json and latest.png (benchmarks)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works, measures nothing")
    return parser.parse_args()


def run() -> None:
    """The body of the process."""
    run_main(lambda: main(_parse()), "benchmark")
