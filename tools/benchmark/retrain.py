"""Does retraining do what it should, whatever comes? 32 scenarios, each in a clone of its own.

    python -m tools.benchmark.retrain                     all of them (1 to 2 hours on 2 cores)
    python -m tools.benchmark.retrain --only clean,label  those whose names contain one of these, in this order
    python -m tools.benchmark.retrain --out FILE.json     every number
    python -m tools.benchmark.retrain --data imagenette2-160.tgz --recipe imagenette160 [section.key=value ...]

A scenario is a batch of new production images, labelled ones to go with it, and what must come of it: nothing, a new
model, or a refusal that leaves everything as it was. Whether drift does harm is counted: the labelled images tell what
the model loses by it. Images are of the generated sample, or taken from the training images of `--data`, which the
model then does without. Exit status 1 where a scenario ends otherwise than it should.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.core.archive import Limits
from stages.core.errors import InputError, run_main
from stages.core.output import write_json
from stages.core.packing import Geometry
from stages.extract import SampleParams
from tools.benchmark.scenarios import SCENARIOS, Drop, Scenario, faults
from tools.benchmark.unseen import UnseenImages, UnseenOfArchive, UnseenOfSample, hold_back
from tools.retrain import rehearsal
from tools.shared import overrides

_PATIENCE = 3600  # seconds for training to begin


def main(arguments: argparse.Namespace) -> int:
    """Run the scenarios, print a table."""
    scenarios = selected(arguments.only)
    rehearsal.check_repository()
    results = []
    with tempfile.TemporaryDirectory(prefix="benchmark-retrain-", ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        images, settings = _unseen_images(arguments, scratch)
        _say(f"a clone of the last commit in {scratch}")
        rehearsal.clone_and_run(Path.cwd(), scratch / "base", settings)
        for index, scenario in enumerate(scenarios):
            _say(f"{index + 1} of {len(scenarios)}: {scenario.name}")
            results.append(_play(scenario, images, scratch, arguments))
            _say(_line(results[-1]))
            if arguments.out:
                write_json(Path(arguments.out), results)
    print(_table(results))
    as_it_should = sum(each["as_it_should"] for each in results)
    recovered = [each["recovered_share"] for each in results if each["decision"] == "promoted"]
    print(f"\n{as_it_should} of {len(results)} ended as they should", end="")
    print(f"; of what was lost, {min(recovered):.0%} at least was won back" if recovered else "")
    return 0 if as_it_should == len(results) else 1


def selected(only: str | None) -> list[Scenario]:
    """The scenarios that `--only` asks for, in the order of its words; InputError for a word that none is named by."""
    scenarios: dict[Scenario, None] = {}
    for word in (only or "").split(","):
        some = [each for each in SCENARIOS if word in each.name]
        if not some:
            raise InputError(f"--only {only}: no scenario is named {word!r} ({'; '.join(s.name for s in SCENARIOS)})")
        scenarios |= dict.fromkeys(some)
    return [*scenarios]


def _unseen_images(arguments: argparse.Namespace, scratch: Path) -> tuple[UnseenImages, overrides.Settings]:
    """New images, and all params of the clone that they come to."""
    fixed: overrides.Settings = {"runtime.cache_dir": str(scratch / "cache")}
    words = [*(f"{key}={value}" for key, value in rehearsal.LESS_MEASURING.items()), *arguments.settings]
    if arguments.data is None:
        composed = overrides.compose_one(words, arguments.recipe, fixed)
        if composed["data"]["source"] != "sample":
            name = composed["data"]["source"]
            raise InputError(f"data.source: {name!r} is not the generated sample; name it by --data")
        return UnseenOfSample(SampleParams.model_validate(composed["sample"])), overrides.flat(composed)
    source, rest = Path(arguments.data).expanduser().absolute(), scratch / "rest.tar"
    if not source.exists():
        raise InputError(f"--data: {arguments.data}: no such file or folder")
    fixed |= {"data.source": str(rest), "data.md5": None, "data.sha256": None}
    composed = overrides.compose_one(words, arguments.recipe, fixed)
    limits = Limits(*(composed["data"][key] for key in ("max_files", "max_bytes", "max_ratio")))
    held_back = hold_back(source, rest, arguments.production, arguments.labelled, limits, scratch)
    geometry = Geometry(*(composed["preprocess"][key] for key in ("image_size", "crop_mode", "interpolation")))
    return UnseenOfArchive(held_back, arguments.production, geometry), overrides.flat(composed)


def _play(scenario: Scenario, images: UnseenImages, scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One scenario in a fresh clone, which is removed; returns what came of it."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        _write_images(scenario, images, folder, arguments)
        command = [*_words(scenario, folder), "--json", str(folder / "summary.json")]
        clone = _fresh_clone(scratch / "base", folder / "clone")
        drop = _true_drop(clone, folder / "drifted", images.classes)
        before = _state(clone)
        if scenario.killed:
            _kill_in_mid_train(clone, command, scenario.killed)
        status = rehearsal.module(clone, "tools.retrain", *command)
        summary = json.loads((folder / "summary.json").read_text())
        after = _state(clone)
    found = faults(scenario, summary, drop, status, before, after)
    return {
        "name": scenario.name,
        "drop": drop._asdict(),
        "verdict": summary["monitor"]["status"],
        "label_shift": summary["monitor"]["label_shift"]["detected"],
        "decision": summary["decision"],
        "accuracy": summary.get("accuracy"),
        "recovered_share": summary.get("recovered_share"),
        "confirmation": summary.get("confirmation", {}).get("status"),
        "reason": summary["reason"],
        "faults": found,
        "as_it_should": not found,
        "seconds": round(time.monotonic() - started),
    }


def _write_images(scenario: Scenario, images: UnseenImages, folder: Path, arguments: argparse.Namespace) -> None:
    """Write production/, drifted/<class>/ of the same kind, and labels/<class>/ where the labels are other ones."""
    num_classes = len(images.classes)
    seen = scenario.classes or num_classes
    production = (index for index in images.production(scenario.seed) if index % num_classes < seen)
    rehearsal.write_images(folder / "production", images, islice(production, arguments.production), scenario.drift)
    labelled = list(islice(images.labelled(scenario.seed), arguments.labelled))
    rehearsal.write_images(folder / "drifted", images, labelled, scenario.drift, by_class=True)
    if scenario.labels == "wrong":
        rehearsal.write_images(folder / "labels", images, labelled, scenario.drift, by_class=True, shift=1)
    elif scenario.labels == "of clean images":
        rehearsal.write_images(folder / "labels", images, labelled, by_class=True)


def _words(scenario: Scenario, folder: Path) -> list[str]:
    """The arguments of tools.retrain."""
    words = [str(folder / "production"), "--start", scenario.start]
    if scenario.simulate:
        assert scenario.drift is not None
        return [*words, "--simulate", f"{scenario.drift[0]}:{scenario.drift[1]}"]
    return [*words, "--labels", str(folder / ("drifted" if scenario.labels == "right" else "labels"))]


def _true_drop(clone: Path, labelled: Path, classes: Sequence[str]) -> Drop:
    """What the model of a clone loses on labelled images against the clean validation images."""
    out = clone.parent / "predictions.json"
    rehearsal.run(clone, sys.executable, "-m", "tools.predict", str(labelled), "--output", str(out))
    spec = json.loads((clone / "models/onnx/model.json").read_text())
    ids = dict(zip(spec["classes"], sorted(classes), strict=True))
    right = [ids[each["class"]] == Path(each["path"]).parent.name for each in json.loads(out.read_text())]
    drifted = sum(right) / len(right)
    clean = float(json.loads((clone / "metrics/evaluate.json").read_text())["top1"])
    limit = float(YAML(typ="safe", pure=True).load(clone / "params.yaml")["drift"]["max_drop"])
    return Drop(clean - drifted, math.sqrt(drifted * (1 - drifted) / len(right)), limit)


def _fresh_clone(base: Path, clone: Path) -> Path:
    rehearsal.run(base, "git", "clone", "--quiet", "--no-tags", str(base), str(clone))
    rehearsal.identify(clone)
    rehearsal.run(clone, *rehearsal.dvc("cache", "dir", "--local", str(base / ".dvc/cache")))
    rehearsal.run(clone, *rehearsal.dvc("checkout", "--quiet"))
    return clone


def _state(clone: Path) -> dict[str, str]:
    """What a run must leave alone unless it promotes."""
    return {
        "HEAD": rehearsal.run(clone, "git", "rev-parse", "HEAD").strip(),
        "tags": rehearsal.run(clone, "git", "tag").strip(),
        "changes": rehearsal.run(clone, "git", "status", "--porcelain").strip(),
        "stale": rehearsal.run(clone, *rehearsal.dvc("status", "train", "evaluate", "drift")).strip(),
    }


def _kill_in_mid_train(clone: Path, command: list[str], victim: str) -> None:
    """Start the tool, and kill it (or also what it started) when training has logged its first steps.

    It ends by itself where the monitor sees no harm: that is judged by the next run.
    """
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", "tools.retrain", *command],
        cwd=clone,
        env=rehearsal.environment(),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + _PATIENCE
    while not any(_has_begun(path) for path in clone.glob(".dvc/tmp/exps/standalone/tmp*/metrics/train/metrics.json")):
        if process.poll() is not None:
            return
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            raise InputError(f"training did not begin within {_PATIENCE} seconds")
        time.sleep(0.2)
    if victim == "all":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _has_begun(path: Path) -> bool:
    try:
        return 0 < int(json.loads(path.read_text())["step"]) <= 40  # the committed file tells the last step of all
    except (FileNotFoundError, ValueError, KeyError):
        return False


def _line(result: dict[str, Any]) -> str:
    end = "as it should" if result["as_it_should"] else f"NOT as it should: {'; '.join(result['faults'])}"
    return f"{result['name']}: {result['verdict']}, {result['decision']} ({result['seconds']} s): {end}"


def _table(results: list[dict[str, Any]]) -> str:
    rows = [
        [
            "production sees",
            "true drop",
            "monitor",
            "decision",
            "drifted top-1",
            "clean top-1",
            "recovered",
            "then",
            "fault",
        ]
    ]
    for each in results:
        top1 = {key: f"{value:.3f}" for key, value in (each["accuracy"] or {}).items()}
        rows.append(
            [
                each["name"],
                f"{each['drop']['value']:.3f}",
                each["verdict"] + (", label shift" if each["label_shift"] else ""),
                each["decision"],
                *(
                    " to ".join(top1[f"{kind}_{age}"] for age in ("before", "after") if f"{kind}_{age}" in top1)
                    for kind in ("drifted", "clean")
                ),
                f"{each['recovered_share']:.0%}" if each["recovered_share"] is not None else "",
                each["confirmation"] or "",
                "; ".join(each["faults"]),
            ]
        )
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _say(line: str) -> None:
    print(f"benchmark.retrain: {line}", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmark.retrain", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--only", help="words of scenarios' names, with commas between, in this order")
    parser.add_argument("--production", type=int, default=100, help="images a batch (100)")
    parser.add_argument("--labelled", type=int, default=1000, help="labelled images (1000)")
    parser.add_argument("--data", help="archive or folder with train/<class>/*, val/<class>/* (the generated sample)")
    parser.add_argument("--recipe", help="a preset of recipes/ over params.yaml")
    parser.add_argument("--out", help="JSON file for every number")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="over params.yaml and the recipe")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(lambda: main(_parse()), "benchmark.retrain")
