"""Does retraining do what it should, whatever comes? 28 scenarios on the generated sample, each in a clone of its own.

    python -m tools.benchmark.retrain                     all of them (1 to 2 hours on 2 cores)
    python -m tools.benchmark.retrain --only clean,label  those whose names contain one of these
    python -m tools.benchmark.retrain --out FILE.json     every number

A scenario is a batch of new production images, labelled ones to go with it, and what must come of it: nothing, a new
model, or a refusal that leaves everything as it was. Exit status 1 where one ends otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stages.core import sample
from stages.core.errors import InputError, run_main
from stages.core.output import write_json
from stages.extract import SampleParams
from tools.retrain import rehearsal

Drift = tuple[str, int]
_NUM_CLASSES = len(sample.CLASSES)
_PATIENCE = 3600  # seconds for training to begin


@dataclass(frozen=True)
class Scenario:
    """What production sees, what somebody labelled, and what must come of it."""

    name: str
    verdict: Literal["ok", "benign", "harmful"]  # of the monitor
    decision: Literal["nothing to do", "promoted", "not promoted"]
    drift: Drift | None = None
    labels: Literal["right", "wrong", "of clean images"] = "right"
    classes: int = _NUM_CLASSES  # that production sees, the first ones
    simulate: bool = False  # in place of labelled images
    start: Literal["current", "scratch"] = "current"
    killed: Literal["all", "tool"] | None = None  # in mid-train, and run again
    seed: int = 0  # other images


def _harmful(kind: str, severity: int, note: str = "", **changes: Any) -> Scenario:
    name = f"{kind} {severity}{note and ', ' + note}"
    return Scenario(**{"name": name, "verdict": "harmful", "decision": "promoted", "drift": (kind, severity)} | changes)


def _benign(kind: str, severity: int) -> Scenario:
    return Scenario(f"{kind} {severity}", "benign", "nothing to do", (kind, severity))


_REFUSED = {"decision": "not promoted"}
SCENARIOS = (
    *(Scenario(f"clean images {seed}", "ok", "nothing to do", seed=seed) for seed in (1, 2, 3)),
    *(Scenario(f"label shift, {n} of 10 classes", "ok", "nothing to do", classes=n) for n in (1, 2, 4)),
    _benign("jpeg_compression", 5),
    _benign("pixelate", 4),
    _benign("motion_blur", 4),
    _benign("gaussian_blur", 3),
    _harmful("gaussian_noise", 4),
    _harmful("shot_noise", 5),
    _harmful("impulse_noise", 4),
    _harmful("snow", 3),
    _harmful("frost", 4),
    _harmful("fog", 4),
    _harmful("brightness", 4),
    _harmful("contrast", 2),
    _harmful("darkness", 4),
    _harmful("spatter", 3),
    _harmful("saturate", 5),
    _harmful("colour_cast", 5),
    _harmful("fog", 4, "simulated", simulate=True),
    _harmful("darkness", 4, "from scratch", start="scratch"),
    _harmful("darkness", 4, "killed in mid-train", killed="all", seed=4),
    _harmful("contrast", 2, "the tool killed, dvc lives on", killed="tool", seed=5),
    _harmful("brightness", 4, "wrong labels", labels="wrong", **_REFUSED),
    _harmful("darkness", 4, "labels of clean images", labels="of clean images", **_REFUSED),
)


def main(arguments: argparse.Namespace) -> int:
    """Run the scenarios, print a table."""
    wanted = arguments.only.split(",") if arguments.only else [""]
    scenarios = [each for each in SCENARIOS if any(word in each.name for word in wanted)]
    if not scenarios:
        raise InputError(f"--only {arguments.only}: no scenario is named so ({'; '.join(s.name for s in SCENARIOS)})")
    params = rehearsal.sample_params()
    results = []
    with tempfile.TemporaryDirectory(prefix="benchmark-retrain-", ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        _say(f"a clone of the last commit in {scratch}")
        overrides = rehearsal.LESS_MEASURING | {"runtime.cache_dir": str(scratch / "cache")}
        rehearsal.clone_and_run(Path.cwd(), scratch / "base", overrides)
        for index, scenario in enumerate(scenarios):
            _say(f"{index + 1} of {len(scenarios)}: {scenario.name}")
            results.append(_play(scenario, params, scratch, arguments))
            _say(_line(results[-1]))
            if arguments.out:
                write_json(Path(arguments.out), results)
    print(_table(results))
    as_it_should = sum(each["as_it_should"] for each in results)
    recovered = [each["recovered_share"] for each in results if each["decision"] == "promoted"]
    print(f"\n{as_it_should} of {len(results)} ended as they should", end="")
    print(f"; of what was lost, {min(recovered):.0%} at least was won back" if recovered else "")
    return 0 if as_it_should == len(results) else 1


def _play(scenario: Scenario, params: SampleParams, scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One scenario in a fresh clone, which is removed; returns what came of it."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        command = [*_images(scenario, params, folder, arguments), "--json", str(folder / "summary.json")]
        clone = _fresh_clone(scratch / "base", folder / "clone")
        before = _state(clone)
        if scenario.killed:
            _kill_in_mid_train(clone, command, scenario.killed)
        status = rehearsal.module(clone, "tools.retrain", *command)
        summary = json.loads((folder / "summary.json").read_text())
        after = _state(clone)
    faults = _faults(scenario, summary, status, before, after)
    return {
        "name": scenario.name,
        "verdict": summary["monitor"]["status"],
        "label_shift": summary["monitor"]["label_shift"]["detected"],
        "decision": summary["decision"],
        "accuracy": summary.get("accuracy"),
        "recovered_share": summary.get("recovered_share"),
        "confirmation": summary.get("confirmation", {}).get("status"),
        "reason": summary["reason"],
        "faults": faults,
        "as_it_should": not faults,
        "seconds": round(time.monotonic() - started),
    }


def _images(scenario: Scenario, params: SampleParams, folder: Path, arguments: argparse.Namespace) -> list[str]:
    """Write production's and labelled images; returns the command's words that name them."""
    first = 10_000 * (scenario.seed + 1)
    step = _NUM_CLASSES
    seen = range(first, first + step * arguments.production // scenario.classes)
    indices = [i for i in seen if i % step < scenario.classes]
    production = folder / "production"
    for index in indices:
        rehearsal.write_images(production, params, range(index, index + 1), scenario.drift)
    words = [str(production), "--start", scenario.start]
    if scenario.simulate:
        assert scenario.drift is not None
        return [*words, "--simulate", f"{scenario.drift[0]}:{scenario.drift[1]}"]
    labelled = range(first + 5000, first + 5000 + arguments.labelled)
    drift = None if scenario.labels == "of clean images" else scenario.drift
    shift = 1 if scenario.labels == "wrong" else 0
    return [
        *words,
        "--labels",
        str(rehearsal.write_images(folder / "labels", params, labelled, drift, by_class=True, shift=shift)),
    ]


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


def _faults(
    scenario: Scenario, summary: dict[str, Any], status: int, before: dict[str, str], after: dict[str, str]
) -> list[str]:
    """What is not as it should be."""
    found, decision = [], summary["decision"]
    for what, is_so, wanted in (
        ("monitor says", summary["monitor"]["status"], scenario.verdict),
        ("decision", decision, scenario.decision),
        ("exit status", status, 1 if scenario.decision == "not promoted" else 0),
    ):
        if is_so != wanted:
            found.append(f"{what} {is_so}, not {wanted}")
    # Under drift the predicted mix may change though the true one does not.
    if scenario.drift is None and summary["monitor"]["label_shift"]["detected"] != (scenario.classes < _NUM_CLASSES):
        found.append("label shift is not what it is")
    if decision == "promoted":
        if after["tags"] != "classifier@v0.0.1":
            found.append(f"tags: {after['tags']}")
        if after["HEAD"] != summary["commit"] or after["HEAD"] == before["HEAD"]:
            found.append("HEAD is not the promotion's commit")
        changed = [key for key in ("changes", "stale") if after[key] != before[key]]
    else:
        changed = [key for key in before if after[key] != before[key]]
    return found + [f"{key} changed: {after[key]}" for key in changed]


def _kill_in_mid_train(clone: Path, command: list[str], victim: str) -> None:
    """Start the tool, and kill it (or also what it started) when training has logged its first steps."""
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", "tools.retrain", *command],
        cwd=clone,
        env=rehearsal.environment(),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + _PATIENCE
    while not any(_has_begun(path) for path in clone.glob(".dvc/tmp/exps/standalone/tmp*/metrics/train/metrics.json")):
        if process.poll() is not None or time.monotonic() > deadline:
            raise InputError(f"training did not begin: the tool ended with {process.poll()}")
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
    rows = [["production sees", "monitor", "decision", "drifted top-1", "clean top-1", "recovered", "then", "fault"]]
    for each in results:
        top1 = {key: f"{value:.3f}" for key, value in (each["accuracy"] or {}).items()}
        rows.append(
            [
                each["name"],
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
    parser.add_argument("--only", help="words of scenarios' names, with commas between")
    parser.add_argument("--production", type=int, default=100, help="images a batch (100)")
    parser.add_argument("--labelled", type=int, default=1000, help="labelled images (1000)")
    parser.add_argument("--out", help="JSON file for every number")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(lambda: main(_parse()), "benchmark.retrain")
