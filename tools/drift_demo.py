"""The whole loop in one command: drift that does harm comes, is noticed, and is trained away.

    python -m tools.drift_demo                   darkness of severity 4: under-exposure
    python -m tools.drift_demo gaussian_noise:5  another kind (stages/core/corruptions.py)

Works in a clone of the last commit, which is removed at the end: this repository stays as it is. Production is played
by new images of the generated sample, which no model has seen: 100 clean ones, 100 drifted ones, and 1000 drifted
ones that somebody has labelled. The drift stage measures less than it does here, to save time.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from ruamel.yaml import YAML

from stages.core import sample
from stages.core.corruptions import corrupt
from stages.core.errors import InputError, run_main
from stages.core.image import decode
from stages.core.params import Section, load_params
from stages.extract import DataParams, SampleParams
from tools.retrain import simulation

NUM_PRODUCTION, NUM_LABELLED = 100, 1000
LESS_MEASURING = {"images_per_condition": 40, "resplits": 3}  # of the drift stage
_SPLIT = 2  # of the generator: 0 is train, 1 is val


class Params(Section):
    """What the demonstration reads of params.yaml."""

    data: DataParams
    sample: SampleParams


def main(arguments: argparse.Namespace) -> int:
    """Clone, let drift come, retrain, look again; print a table."""
    kind, severity = simulation(arguments.drift)
    params = load_params(Params)
    if params.data.source != "sample":
        raise InputError(
            f"params.yaml: data.source: the demonstration needs the generated sample, not {params.data.source!r}"
        )
    if not Path(".git").exists():
        raise InputError("no git repository here; run this from the root of the repository")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="drift-demo-", ignore_cleanup_errors=True) as scratch:
        clone = Path(scratch) / "clone"
        _clone(Path.cwd(), clone)
        images = Path(scratch) / "images"
        _write_images(images, params.sample, kind, severity)
        steps = {
            "clean images": _monitor(clone, images / "clean"),
            f"{kind} {severity}": _monitor(clone, images / "drifted"),
        }
        out = Path(scratch) / "retrain.json"
        command = ["tools.retrain", str(images / "drifted"), "--labels", str(images / "labels"), "--json", str(out)]
        status = _module(clone, *command)
        summary = json.loads(out.read_text()) if out.exists() else {}
        steps[f"{kind} {severity}, after retraining"] = _monitor(clone, images / "drifted")
    print(_table(steps))
    print(f"\n{_accuracies(summary)}drift-demo: {time.monotonic() - started:.0f} s; this repository is as it was")
    last = list(steps.values())[-1]
    return 0 if status == 0 and summary.get("decision") == "promoted" and last["status"] != "harmful" else 1


def _clone(root: Path, clone: Path) -> None:
    """Clone the last commit with its data and model: out of this repository's cache, or made anew."""
    say(f"a clone of the last commit in {clone.parent}")
    _run(root, "git", "clone", "--quiet", "--no-hardlinks", str(root), str(clone))
    for key, value in (("user.name", "drift-demo"), ("user.email", "drift-demo@localhost")):
        _run(clone, "git", "config", key, value)
    _run(clone, *_dvc("config", "--local", "core.analytics", "false"))
    _run(clone, *_dvc("remote", "add", "--quiet", "--local", "here", str(root / ".dvc/cache")))
    _run(clone, *_dvc("pull", "--quiet", "--remote", "here", "--allow-missing"), check=False)
    yaml = YAML()
    document = yaml.load((clone / "params.yaml").read_text())
    document["drift"].update(LESS_MEASURING)
    with (clone / "params.yaml").open("w") as file:
        yaml.dump(document, file)
    _run(clone, *_dvc("repro"), quiet=False)
    _run(clone, "git", "add", "--all")
    _run(clone, "git", "commit", "--quiet", "--allow-empty", "--message", "As made here")


def _write_images(folder: Path, params: SampleParams, kind: str, severity: int) -> None:
    say(f"{NUM_PRODUCTION} clean images, {NUM_PRODUCTION} under {kind} {severity}, and {NUM_LABELLED} labelled ones")
    for index in range(2 * NUM_PRODUCTION + NUM_LABELLED):
        content = sample.render(params.seed, _SPLIT, index, params.image_size)
        pixels = decode(content, str(index), params.image_size)
        name = f"{index:05d}.png"
        if index < NUM_PRODUCTION:
            path = folder / "clean" / name
        else:
            pixels = corrupt(pixels[None], kind, severity, np.array([index]), seed=7)[0]
            class_name = sample.CLASSES[index % len(sample.CLASSES)]
            path = folder / ("drifted" if index < 2 * NUM_PRODUCTION else f"labels/{class_name}") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
        path.write_bytes(buffer.getvalue())


def _monitor(clone: Path, images: Path) -> dict[str, Any]:
    out = clone.parent / "verdict.json"
    out.unlink(missing_ok=True)
    say(f"python -m tools.monitor {images}")
    _module(clone, "tools.monitor", str(images), "--json", str(out))
    verdict: dict[str, Any] = json.loads(out.read_text())
    return verdict


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


def _dvc(*words: str) -> list[str]:
    return [sys.executable, "-m", "dvc", *words]


def _module(folder: Path, *words: str) -> int:
    """Run a tool of ours, its words shown; returns its exit status, of which 2 raises InputError."""
    status = subprocess.run([sys.executable, "-m", *words], cwd=folder, env=_environment()).returncode  # noqa: S603
    if status == 2:
        raise InputError(f"python -m {words[0]} failed; its words are above")
    return status


def _run(folder: Path, *command: str, check: bool = True, quiet: bool = True) -> str:
    result = subprocess.run(  # noqa: S603
        command, cwd=folder, env=_environment(), text=True, stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.PIPE if quiet else None,
    )  # fmt: skip
    if check and result.returncode:
        raise InputError(f"`{' '.join(command[:5])}` failed: {(result.stderr or '').strip()}")
    return result.stdout or ""


def _environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {key: value for key, value in os.environ.items() if key != "DVC_ROOT"} | {"PATH": path}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="drift-demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "drift", nargs="?", default="darkness:4", metavar="KIND:SEVERITY", help="what comes (darkness:4)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_main(lambda: main(_parse()), "drift-demo")
