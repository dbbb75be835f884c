"""When drift does harm: retrain on labelled drifted images, prove that it helped, and only then promote the new model.

    python -m tools.retrain IMAGES --labels FOLDER     labelled drifted images: <class>/*, or train/ and val/ of these
    python -m tools.retrain IMAGES --simulate fog:5    a trial: the pipeline's own images, corrupted

IMAGES are those that production sees (what tools.monitor takes). Unless the monitor calls their drift harmful, nothing
is done. Else a DVC experiment trains on the images of the pipeline and the labelled ones; its model is promoted (a
commit, and a version in the registry) if it wins back most of what was lost, loses next to nothing on clean images, and
the monitor is not sure of harm any more. Otherwise the workspace, the branch and the tags stay as they are.
docs/RETRAINING.md explains.

Exit status: 0 promoted, or nothing to do; 1 not promoted, or the experiment failed; 2 bad input. Killed at any point:
run the same command again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from stages.core.archive import Limits
from stages.core.corruptions import FAMILIES, SEVERITIES
from stages.core.dataset import load_meta
from stages.core.errors import InputError, Stopped
from stages.core.output import json_text, write_bytes
from stages.core.params import load_params
from tools.monitor import command as monitor
from tools.retrain import experiment, kept, labelled
from tools.retrain.params import Params
from tools.shared import process
from tools.shared.arguments import output_file, write_output
from tools.shared.process import run_tool

CLASSIFIER, DETECTOR = "models/classifier", "models/drift"
_VERDICTS = {status: verdict for verdict, status in monitor.EXIT_STATUS.items()}
_WEIGHTS = re.compile(r"retrain/weights-[0-9a-f]{16}\.safetensors$")  # a copy that a retraining started from


def main(arguments: argparse.Namespace) -> int:
    """Ask the monitor, and do what its verdict asks for."""
    simulated = simulation(arguments.simulate) if arguments.simulate else None
    # What the command is about: a promotion that was broken off is this command's, or another one's.
    summary: dict[str, Any] = {
        "images": str(Path(arguments.images).absolute()),
        "labels": str(Path(arguments.labels).absolute()) if arguments.labels else None,
        "simulate": arguments.simulate,
        "start": arguments.start,
    }
    with experiment.only_run() as lock, experiment.scratch_folder() as scratch:
        finished = experiment.finish_promotion()
        if finished is not None:
            print(f"retrain: the promotion of {finished['experiment']}, which was broken off, is finished")
            if all(finished[key] == value for key, value in summary.items()):
                return _report(arguments, finished)
            experiment.forget_promotion()
        head = experiment.check_repository()
        params = load_params(Params)  # not before: a promotion that was broken off may have left half of the file
        present = labelled.current_extra() if params.data.extra is not None else []
        with _labelled_images(arguments.labels, simulated, params, scratch, present) as images:
            verdict = _ask_monitor(arguments.images, scratch)
            summary["monitor"] = verdict
            if verdict["status"] != "harmful":
                return _report(arguments, summary | {"decision": "nothing to do", "reason": _no_harm(verdict)})
            print(f"retrain: harmful drift, {_numbers(verdict)}", flush=True)
            return _report(arguments, _retrain(summary, images, present, params, head, lock, scratch))


def _retrain(
    summary: dict[str, Any],
    images: labelled.LabelledSet,
    present: list[labelled.LabelledImage],
    params: Params,
    head: str,
    lock: int,
    scratch: Path,
) -> dict[str, Any]:
    """Run the experiment, judge its model, promote it or leave everything as it was. Returns the whole summary."""
    from tools.retrain.judgement import Trial, doubt, no_damage, objection

    num_train, num_held_out = images.count("train"), images.count("val")
    summary["labelled"] = {
        "origin": images.origin, "key": images.key, "num_train": num_train, "num_held_out": num_held_out,
    }  # fmt: skip
    trial = Trial(images, params)
    trial.ask(Path(CLASSIFIER))
    now = trial.accuracies()
    if reason := no_damage(now):
        before = {key: getattr(now, key) for key in ("clean_before", "matched_before", "drifted_before")}
        return summary | {"decision": "not promoted", "reason": reason, "accuracy": before}
    known = scratch / "trained-on"  # images that the new model will know by heart say nothing of others
    known.write_text("".join(f"{image.digest}\n" for image in (*images.images, *present) if image.split == "train"))
    try:
        _ask_monitor(summary["images"], scratch, known=known)
    except InputError as error:
        reason = (
            "IMAGES leave nothing to prove the new model with, once those that it is trained on are left out: "
            f"{error}; give others, or hold more of the labelled ones out (retrain.held_out)"
        )
        return summary | {"decision": "not promoted", "reason": reason}
    overrides, needed = _overrides(summary["start"], params, images, present, head)
    name = experiment.experiment_name(head, overrides)
    print(
        f"retrain: {num_train:,} labelled images to train on, {num_held_out:,} held out (top-1 "
        f"{now.drifted_before:.4f}, {now.matched_before:.4f} on clean images of the same classes); experiment {name}",
        flush=True,
    )
    summary |= {
        "overrides": overrides,
        "experiment": name,
        "commit_before": head,
        "limits": {key: getattr(params.retrain, key) for key in ("min_recovered", "max_clean_loss")},
    }
    try:
        commit = experiment.run_experiment(name, head, overrides, lock, needed)
        new = scratch / "new"
        experiment.fetch(commit, [CLASSIFIER, DETECTOR], new)
    except experiment.ExperimentError as error:
        return summary | {"decision": "failed", "reason": str(error)}

    trial.ask(new / CLASSIFIER)
    found = trial.accuracies()
    summary |= {
        "experiment_commit": commit,
        "accuracy": vars(found),
        "lost": found.lost,
        "recovered_share": found.recovered,
        "clean_loss": found.clean_loss,
    }
    if reason := objection(found, params.retrain):
        return summary | {"decision": "not promoted", "reason": reason}
    try:
        confirmation = _ask_monitor(summary["images"], scratch, new, known)
    except InputError as error:
        reason = f"the monitor refuses the new model and its reference: {error}"
        return summary | {"decision": "not promoted", "reason": reason}
    summary["confirmation"] = confirmation
    if reason := doubt(confirmation):
        return summary | {"decision": "not promoted", "reason": f"{reason}: {_numbers(confirmation)}"}

    reason = (
        f"{found.recovered:.0%} of the lost accuracy is back: top-1 {found.drifted_before:.4f} to "
        f"{found.drifted_after:.4f} on held-out drifted images, {found.clean_before:.4f} to {found.clean_after:.4f} on "
        f"clean ones; the monitor says {confirmation['status']}"
    )
    if confirmation["status"] == "harmful":
        reason += f", but {confirmation['num_images']} images leave it open whether it is: {_numbers(confirmation)}"
    message = f"Retrain on drifted images\n\n{reason}.\nExperiment {name}, images of {Path(images.origin).name}."
    try:
        return experiment.promote(head, commit, message, summary | {"decision": "promoted", "reason": reason}, needed)
    except experiment.ExperimentError as error:
        return summary | {"decision": "not promoted", "reason": str(error)}


# --- the parts ----------------------------------------------------------------------------------------------------


@contextmanager
def _labelled_images(
    labels: str,
    simulated: tuple[str, int] | None,
    params: Params,
    scratch: Path,
    present: list[labelled.LabelledImage],
) -> Iterator[labelled.LabelledSet]:
    if simulated is not None:
        yield labelled.simulate(*simulated, params.retrain.simulated_share)
        return
    data = params.data
    limits = Limits(files=data.max_files, total_bytes=data.max_bytes, ratio=data.max_ratio)
    classes = load_meta().class_ids
    folder, held_out = Path(labels).expanduser(), params.retrain.held_out
    with labelled.open_folder(folder, limits, scratch, classes, held_out, present) as images:
        yield images


def simulation(text: str) -> tuple[str, int]:
    """The kind and severity of KIND:SEVERITY; InputError naming the choices."""
    kind, _, severity = text.partition(":")
    if kind not in FAMILIES or severity not in map(str, SEVERITIES):
        raise InputError(
            f"{text!r} is not KIND:SEVERITY (kinds: {', '.join(FAMILIES)}; "
            f"severities: {', '.join(map(str, SEVERITIES))})"
        )
    return kind, int(severity)


def _ask_monitor(images: str, scratch: Path, new: Path | None = None, known: Path | None = None) -> dict[str, Any]:
    """The verdict of tools.monitor on the production images: by the workspace's model and detector, or those in `new`.

    Images whose digests `known` lists are left out.
    """
    out = scratch / "verdict.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tools.monitor", str(images), "--json", str(out)]
    if new is not None:
        command += ["--classifier", str(new / CLASSIFIER), "--detector", str(new / DETECTOR)]
    if known is not None:
        command += ["--leave-out", str(known)]
    result = process.run(command)
    words = (result.stderr or result.stdout).strip()
    if result.returncode == 2:
        raise InputError(words.split("monitor: error: ")[-1])  # what comes before is progress
    if result.returncode < 0:  # the kernel's out-of-memory killer leaves no words
        reason = f"the monitor was ended by signal {-result.returncode} (out of memory?); run the same command again"
        raise Stopped(reason, -result.returncode)
    if result.returncode == 1 and "Traceback" not in words:  # what the machine refuses, as a full disk
        raise ConnectionError(words)
    if result.returncode not in _VERDICTS or not out.exists():
        raise RuntimeError(f"the monitor ended with exit status {result.returncode}: {words}")
    verdict: dict[str, Any] = json.loads(out.read_text())
    if verdict["status"] != _VERDICTS[result.returncode]:
        raise RuntimeError(f"the monitor says {verdict['status']}, but its exit status is {result.returncode}")
    keys = ("status", "num_images", "p_value", "alpha", "estimated_accuracy", "interval", "clean_accuracy",
            "estimated_drop", "max_drop", "label_shift")  # fmt: skip
    return {key: verdict[key] for key in keys}


def _overrides(
    start: Literal["current", "scratch"],
    params: Params,
    images: labelled.LabelledSet,
    present: list[labelled.LabelledImage],
    head: str,
) -> tuple[dict[str, experiment.Value], list[Path]]:
    """What the experiment changes of params.yaml, and the files that these name, which are written."""
    archive = labelled.write_archive(images, present, kept.FOLDER)
    overrides: dict[str, experiment.Value] = {
        "data.extra": archive.path.as_posix(),
        "data.extra_sha256": archive.sha256,
    }
    if start == "scratch":
        return overrides | _recipe_from_scratch(head), [archive.path]
    weights = (Path(CLASSIFIER) / "model.safetensors").read_bytes()
    copy = kept.FOLDER / f"weights-{hashlib.sha256(weights).hexdigest()[:16]}.safetensors"
    write_bytes(copy, weights)
    return overrides | {
        "model.weights": copy.as_posix(),
        "model.pretrained": False,
        "train.epochs": params.retrain.epochs,
        "train.lr": params.retrain.lr,
        "train.warmup_epochs": params.retrain.warmup_epochs,
    }, [archive.path, copy]


def _recipe_from_scratch(head: str) -> dict[str, experiment.Value]:
    """What made the last model that was not itself retrained from another one."""
    original = experiment.params_when(lambda params: not _WEIGHTS.search(params["model"]["weights"] or ""), head)
    if original is None:
        raise InputError(
            "--start scratch: no commit here has a model.weights that is not of a retraining; set model.weights to "
            "null and train.epochs, train.lr and train.warmup_epochs to what a whole run needs, `dvc repro`, and commit"
        )
    keys = ("model.weights", "model.pretrained", "train.epochs", "train.lr", "train.warmup_epochs")
    return {key: original[section][name] for key in keys for section, name in [key.split(".")]}


# --- words --------------------------------------------------------------------------------------------------------


def _no_harm(verdict: dict[str, Any]) -> str:
    what = {"ok": "no drift", "benign": "drift, but it does no harm"}[verdict["status"]]
    shift = verdict["label_shift"]
    mix = f"; the mix of classes changed (p {shift['p_value']:.2g})" if shift["detected"] else ""
    return f"{what}: {_numbers(verdict)}{mix}"


def _numbers(verdict: dict[str, Any]) -> str:
    low, high = verdict["interval"]
    return (
        f"{verdict['num_images']:,} images, p {verdict['p_value']:.2g}, estimated accuracy "
        f"{verdict['estimated_accuracy']:.3f} ({low:.3f} to {high:.3f}), clean {verdict['clean_accuracy']:.3f}"
    )


def _report(arguments: argparse.Namespace, summary: dict[str, Any]) -> int:
    """Say and write what came of it; returns the exit status."""
    decision = summary["decision"]
    tag = f" as {summary['tag']}" if summary.get("tag") else ""
    kept = "; the model at work stays" if decision in ("not promoted", "failed") else ""
    print(f"retrain: {decision}{tag}: {summary['reason']}{kept}", flush=True)
    if arguments.json:
        write_output("--json", arguments.json, json_text(summary))
    experiment.forget_promotion()
    return 1 if decision in ("not promoted", "failed") else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="retrain", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("images", help="production images, as tools.monitor takes them")
    labels = parser.add_mutually_exclusive_group(required=True)
    labels.add_argument("--labels", help="folder or archive of labelled drifted images: <class>/*, or train/ and val/")
    labels.add_argument("--simulate", metavar="KIND:SEVERITY", help="a trial: the pipeline's own images, corrupted")
    parser.add_argument(
        "--start", choices=("current", "scratch"), default="current", help="weights to start from (current)"
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="file for all numbers and the decision")
    return parser.parse_args()


def run() -> None:
    """The body of the process."""
    run_tool(lambda: main(_parse()), "retrain")
