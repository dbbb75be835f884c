"""The whole loop in one command: drift that does harm comes, is noticed, and is trained away.

    python -m tools.drift_demo                   darkness of severity 4: under-exposure
    python -m tools.drift_demo gaussian_noise:5  another kind (stages/core/corruptions.py)

Works in a clone of the last commit, which is removed at the end: this repository stays as it is. Production is played
by new images of the generated sample, which no model has seen: 100 clean ones, 100 drifted ones, and 1000 drifted
ones that somebody has labelled. The drift stage measures less than it does here, to save time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from stages.core.errors import run_main
from tools.retrain import rehearsal
from tools.retrain.command import simulation

NUM_PRODUCTION, NUM_LABELLED = 100, 1000


def main(arguments: argparse.Namespace) -> int:
    """Clone, let drift come, retrain, look again; print a table."""
    kind, severity = drift = simulation(arguments.drift)
    new = rehearsal.NewSampleImages(rehearsal.sample_params())
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="drift-demo-", ignore_cleanup_errors=True) as scratch:
        clone, images = Path(scratch) / "clone", Path(scratch) / "images"
        say(f"a clone of the last commit in {scratch}")
        rehearsal.clone_and_run(Path.cwd(), clone, rehearsal.LESS_MEASURING)
        say(
            f"{NUM_PRODUCTION} clean images, {NUM_PRODUCTION} under {kind} {severity}, and {NUM_LABELLED} labelled ones"
        )
        first, labelled = 2 * NUM_PRODUCTION, range(2 * NUM_PRODUCTION, 2 * NUM_PRODUCTION + NUM_LABELLED)
        clean = rehearsal.write_images(images / "clean", new, range(NUM_PRODUCTION))
        drifted = rehearsal.write_images(images / "drifted", new, range(NUM_PRODUCTION, first), drift)
        rehearsal.write_images(images / "labels", new, labelled, drift, by_class=True)
        steps = {"clean images": _monitor(clone, clean), f"{kind} {severity}": _monitor(clone, drifted)}
        out = Path(scratch) / "retrain.json"
        command = ["tools.retrain", str(drifted), "--labels", str(images / "labels"), "--json", str(out)]
        status = rehearsal.module(clone, *command)
        summary = json.loads(out.read_text()) if out.exists() else {}
        steps[f"{kind} {severity}, after retraining"] = _monitor(clone, drifted)
    print(_table(steps))
    print(f"\n{_accuracies(summary)}drift-demo: {time.monotonic() - started:.0f} s; this repository is as it was")
    last = list(steps.values())[-1]
    return 0 if status == 0 and summary.get("decision") == "promoted" and last["status"] != "harmful" else 1


def _monitor(clone: Path, images: Path) -> dict[str, Any]:
    say(f"python -m tools.monitor {images}")
    return rehearsal.monitor(clone, images)


def _table(steps: dict[str, dict[str, Any]]) -> str:
    rows = [["production sees", "monitor", "p", "estimated accuracy", "on clean images"]]
    for name, verdict in steps.items():
        low, high = verdict["interval"]
        estimate = f"{verdict['estimated_accuracy']:.3f} ({low:.3f} to {high:.3f})"
        rows.append(
            [name, verdict["status"], f"{verdict['p_value']:.2g}", estimate, f"{verdict['clean_accuracy']:.3f}"]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    return "\n" + "\n".join(f"| {' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True))} |" for row in rows)


def _accuracies(summary: dict[str, Any]) -> str:
    if "accuracy" not in summary:
        return ""
    found = summary["accuracy"]
    return (
        f"true top-1, model before and after: {found['drifted_before']:.3f} and {found['drifted_after']:.3f} on "
        f"{found['num_drifted']} held-out drifted images, {found['clean_before']:.3f} and {found['clean_after']:.3f} "
        f"on {found['num_clean']} clean ones\n"
    )


def say(line: str) -> None:
    """Print a line at once."""
    print(f"drift-demo: {line}", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="drift-demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "drift", nargs="?", default="darkness:4", metavar="KIND:SEVERITY", help="what comes (darkness:4)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_main(lambda: main(_parse()), "drift-demo")
