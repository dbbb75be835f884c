"""Has what the classifier sees in production drifted, and does it hurt? Unlabelled images in, a verdict out.

    python -m tools.monitor IMAGES                  a folder, an archive, image files, or a packed .npy
    python -m tools.monitor IMAGES --json FILE --html FILE
    python -m tools.monitor FOLDER --stream         windows over a folder that grows
    ... | python -m tools.monitor - --stream        or over paths, one a line

Exit status: 0 ok, 10 benign drift, 20 harmful drift, 2 error. With --stream: the worst that was seen; a stream that
ends before its first window is full is an error.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.errors import InputError, run_main
from stages.core.params import Section, load_params
from stages.core.runtime import RuntimeParams
from tools.shared.arguments import at_least, close_stdout, output_file, write_output

if TYPE_CHECKING:
    from stages.core.detector import Detector, Judgement
    from stages.core.features import Extractor
    from stages.core.production import ImageFile

EXIT_STATUS = {"ok": 0, "benign": 10, "harmful": 20}
# Copies of an image say nothing new, and would count as if they did: clean windows have none. But where one image is
# more than this share of all, a camera stands still or sends black frames, and that is what production sees.
_ONE_PICTURE = 0.25
_OF_REPORT = ("json", "html", "top", "leave_out")
_OF_STREAM = ("window", "run_length", "idle")
_WORDS = {
    "ok": "no drift found",
    "benign": "drift, and little harm",
    "harmful": "drift that hurts the classifier",
}


class Params(Section):
    """What this tool reads of params.yaml: the machine. Everything else lies beside the detector."""

    runtime: RuntimeParams


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge images, say what was found, and return the exit status."""
    options = _parser().parse_args(arguments)
    runtime = load_params(Params).runtime
    for name in _OF_REPORT if options.stream else _OF_STREAM:
        if getattr(options, name) is not None:
            option = f"--{name.replace('_', '-')}"
            if options.stream:
                raise InputError(f"{option}: a stream has no report, only a line a window; leave it or --stream out")
            raise InputError(f"{option}: this is of a stream; add --stream or leave it out")
    return _watch(options, runtime) if options.stream else _judge(options, runtime)


def _judge(options: argparse.Namespace, runtime: RuntimeParams) -> int:
    """One verdict over all images."""
    from stages.core.detector import SMALLEST_WINDOW
    from stages.core.output import json_text
    from stages.core.production import distinct, find_images, keep_rows, printable, read_images

    files = found = find_images(options.images)
    if options.leave_out is not None:
        files = _without(found, options.leave_out)
    detector, extractor = open_detector(options.detector, options.classifier, runtime)
    spec = detector.spec
    window = read_images(files, spec.image_size, spec.crop_mode, spec.interpolation)
    if len(window.images) < SMALLEST_WINDOW:
        reasons = "".join(f"\n  {printable(f'{name}: {reason}')}" for name, reason in window.skipped[:5])
        raise InputError(
            f"{' '.join(options.images)}: {len(window.images)} readable image{'s' * (len(window.images) != 1)}; "
            f"nothing can be said of fewer than {SMALLEST_WINDOW}{reasons}"
        )
    rows, most = distinct(window.images)
    num_copies = len(window.images) - len(rows)
    if leaves_out := num_copies > 0 and most <= _ONE_PICTURE * len(window.images):
        window = keep_rows(window, rows)
    features = extractor.features(window.images)
    judgement = detector.judge(features, extractor.adapted_to_all(window.images, detector.largest_fitted))
    population = detector.population(features)
    oddness = detector.oddness(population)
    top = 12 if options.top is None else options.top
    strangest = oddness.argsort(kind="stable")[::-1][:top]
    report = as_json(judgement, detector, len(window.images)) | {
        "listed": len(found) - len(files),
        "copies": {"number": num_copies, "left_out": leaves_out},
        "images": [
            {
                "path": window.names[row],
                "oddness": round(float(oddness[row]), 3),
                "predicted": extractor.spec.classes[int(population.classes[row])],
            }
            for row in strangest
        ],
        "skipped": [{"path": name, "reason": reason} for name, reason in window.skipped],
    }
    _say(in_words(report))
    if options.json:
        write_output("--json", options.json, json_text(report))
    if options.html:
        from tools.monitor.page import page

        write_output("--html", options.html, page(report, [window.images[row] for row in strangest]))
    return EXIT_STATUS[judgement.status]


def _without(files: list[ImageFile], listed: Path) -> list[ImageFile]:
    """The files but those whose content a file lists, by their SHA-256; InputError where none is left."""
    try:
        digests = set(listed.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--leave-out: {listed}: {error}") from None

    def is_listed(file: ImageFile) -> bool:
        try:
            return hashlib.sha256(file.read()).hexdigest() in digests
        except (InputError, OSError):
            return False  # reading it for the verdict says what is wrong

    rest = [file for file in files if not is_listed(file)]
    if not rest:
        raise InputError(f"--leave-out: all {len(files):,} images are listed in {listed}")
    return rest


def _say(text: str) -> bool:
    """Print, and say whether anybody reads it; where nobody does any more (`| head`), the exit status still tells."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        close_stdout()
        return False
    return True


def _watch(options: argparse.Namespace, runtime: RuntimeParams) -> int:
    """A verdict on each window of a stream, until it ends or is interrupted."""
    from stages.core.production import printable
    from tools.monitor.stream import judge_stream, open_stream, stream_alpha

    files = open_stream(options.images, options.idle)
    detector, extractor = open_detector(options.detector, options.classifier, runtime)
    window = 25 if options.window is None else options.window
    run_length = 10_000 if options.run_length is None else options.run_length
    alpha = stream_alpha(detector, window, run_length)
    _say(
        f"monitor: windows of {window}, a false alarm every {run_length:,} images on average (alpha {alpha:g} a window)"
    )
    worst = 0
    try:
        for number, names, judgement in judge_stream(detector, extractor, files, window, run_length):
            shift = ", label shift" if judgement.class_shift else ""
            worst = max(worst, EXIT_STATUS[judgement.status])
            is_read = _say(
                f"window {number}, {printable(names[0])} to {printable(names[-1])}: {judgement.status} "
                f"(p = {_p_value(judgement.p_value)}{shift}), "
                f"estimated accuracy {judgement.accuracy:.3f} ({judgement.low:.3f} to {judgement.high:.3f})"
            )
            if not is_read:
                break
    except KeyboardInterrupt:
        pass  # the way to end a stream
    return worst


def open_detector(folder: Path, classifier: Path, runtime: RuntimeParams) -> tuple[Detector, Extractor]:
    """The detector and the classifier that it was calibrated for."""
    from stages.core import detector as detectors
    from stages.core import device, model, precision
    from stages.core.features import Extractor

    detector = detectors.load(folder)
    where = device.set_up(runtime)
    network, spec = model.load(classifier, where)
    if spec.class_ids != detector.spec.class_ids:
        raise InputError(
            f"{folder} was calibrated for {len(detector.spec.class_ids)} classes "
            f"({', '.join(detector.spec.class_ids[:3])}, ...), {classifier} has {len(spec.class_ids)} "
            f"({', '.join(spec.class_ids[:3])}, ...): run `dvc repro drift`, or name the detector of this classifier"
        )
    if spec.sha256 != detector.spec.classifier_sha256:
        raise InputError(
            f"{folder} was calibrated for another classifier than {classifier}, which has been trained since: run "
            "`dvc repro drift`, or name the detector of this classifier"
        )
    policy = precision.resolve(detector.spec.precision, where, key="drift.precision (the detector has it)")
    return detector, Extractor(network, spec, policy, where)


def as_json(judgement: Judgement, detector: Detector, num_images: int) -> dict[str, Any]:
    """The report as JSON has it: probabilities and accuracies as shares."""
    spec = detector.spec
    return {
        "status": judgement.status,
        "num_images": num_images,
        "num_tested": judgement.num_tested,
        "p_value": judgement.p_value,
        "alpha": spec.alpha,
        "estimated_accuracy": round(judgement.accuracy, 4),
        "interval": [round(judgement.low, 4), round(judgement.high, 4)],
        "clean_accuracy": round(spec.baselines.accuracy, 4),
        "estimated_drop": round(judgement.drop, 4),
        "max_drop": spec.max_drop,
        "label_shift": {
            "detected": judgement.class_shift,
            "p_value": judgement.class_p_value,
            "accounted_for": judgement.same_mix,
        },
        "moved": [
            {"measure": moved.name, "shift": round(moved.shift, 3), "evidence": round(moved.evidence, 2)}
            for moved in judgement.moved[:8]
        ],
    }


def _p_value(p_value: float) -> str:
    return f"{p_value:.4f}" if p_value >= 1e-4 else f"{p_value:.1g}"


def what_shift_means(report: dict[str, Any]) -> str:
    """What a label shift beside image drift may be."""
    if report["label_shift"]["accounted_for"]:
        return "which the drift may have caused"
    return "and may be all of the drift: there are too few clean images of these classes to compare with"


def what_copies_mean(report: dict[str, Any]) -> str:
    """What became of images that are copies of others."""
    number = report["copies"]["number"]
    if report["copies"]["left_out"]:
        return f"{number} copies of other images were left out"
    return f"{number} of the images are copies, many of one: does a camera stand still? They count, so p is too small"


def in_words(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    from stages.core.production import printable

    low, high = report["interval"]
    lines = [
        f"monitor: {report['status']}: {_WORDS[report['status']]} in {report['num_images']} images "
        f"(p = {_p_value(report['p_value'])}, alpha {report['alpha']:g})",
        f"  estimated accuracy {report['estimated_accuracy']:.3f} (95 %: {low:.3f} to {high:.3f}), "
        f"{report['clean_accuracy']:.3f} on clean images; a drop of more than {report['max_drop']:g} is harm",
    ]
    shift = report["label_shift"]
    if shift["detected"]:
        why = "" if report["status"] == "ok" else f", {what_shift_means(report)}"
        lines.append(f"  label shift: the mix of predicted classes changed (p = {_p_value(shift['p_value'])}){why}")
    if report["num_tested"] < report["num_images"]:
        lines.append(f"  {report['num_tested']} of the images were compared")
    if report["listed"]:
        lines.append(f"  {report['listed']} left out, listed by --leave-out")
    if report["copies"]["number"]:
        lines.append(f"  {what_copies_mean(report)}")
    if skipped := report["skipped"]:
        left_out = ", ".join(printable(each["path"]) for each in skipped[:5])
        more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        lines.append(f"  {len(skipped)} left out, cannot be read: {left_out}{more}")
    if report["status"] != "ok":
        moved = [f"{row['measure']} {row['shift']:+.1f}" for row in report["moved"][:5]]
        lines.append(f"  moved most (in standard deviations): {', '.join(moved)}")
        lines.append(f"  strangest: {', '.join(printable(row['path']) for row in report['images'][:3])}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.monitor", description=__doc__.split("\n\n")[0])
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="folder, archive, image file or packed .npy")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the report as JSON")
    parser.add_argument("--html", type=output_file, metavar="FILE", help="write a self-contained page with pictures")
    parser.add_argument("--top", type=at_least(0), metavar="N", help="how many strange images to show (12)")
    parser.add_argument(
        "--leave-out", type=Path, metavar="FILE", help="list of the SHA-256 digests of images to leave out"
    )
    parser.add_argument("--classifier", type=Path, default=Path("models/classifier"), metavar="DIR")
    parser.add_argument("--detector", type=Path, default=Path("models/drift"), metavar="DIR")
    parser.add_argument("--stream", action="store_true", help="judge one window after the other, as images come")
    parser.add_argument("--window", type=int, metavar="N", help="images in a window of the stream (25)")
    parser.add_argument("--run-length", type=int, metavar="N", help="images to a false alarm (10000)")
    parser.add_argument(
        "--idle", type=at_least(0.0), metavar="S", help="end the stream after S seconds without an image"
    )
    return parser


def run() -> None:
    """The body of the process."""
    run_main(main, "monitor")
