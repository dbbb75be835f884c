"""What the drift stage does not measure: harmless changes, label shift, the stream, and the monitor's time.

    python -m tools.benchmark.drift
    pip install --no-deps torchdrift && python -m tools.benchmark.drift --torchdrift   compares with TorchDrift only

It needs a pipeline that has run: the classifier, the detector and the packed images of this folder. The check images,
which the detector has not seen, stand for production. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from stages.core.corruptions import STANDARD_KINDS, corrupt
from stages.core.dataset import load_file_names, load_meta, load_split
from stages.core.detector import Detector
from stages.core.drift_check import false_alarms, split
from stages.core.errors import InputError, run_main
from stages.core.features import Extractor
from stages.core.measures import measure
from stages.core.params import load_params
from stages.core.progress import progress
from stages.core.source import is_extra
from stages.core.two_sample import evidence
from stages.drift import Params
from tools.monitor.command import open_detector

Pixels = NDArray[np.uint8]
_STREAM_WINDOW, _RUN_LENGTH = 25, 10_000


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmark.drift", description=__doc__)
    parser.add_argument("--resplits", type=int, default=20, help="of the clean images, for the stream (20)")
    parser.add_argument("--torchdrift", action="store_true", help="compare with TorchDrift on windows of 50, only")
    options = parser.parse_args(arguments)
    params = load_params(Params)
    detector, extractor = open_detector(Path("models/drift"), Path("models/classifier"), params.runtime)
    images, labels, _ = load_split("val", load_meta())
    is_of_extra = np.array([is_extra(name) for name in load_file_names("val")])
    if is_of_extra.any():  # drifted ones: as in the drift stage, clean images are those of the source
        images, labels = images[~is_of_extra], labels[~is_of_extra]
    check = split(len(labels), np.random.default_rng(params.drift.seed)).check
    if options.torchdrift:
        rows = list(_torchdrift(images, labels, check, detector, extractor))
        print("| windows of 50, alpha 1 % | clean windows | drifted windows | harmful |\n|---|---|---|---|")
        for row in rows:
            print(f"| {' | '.join(row)} |")
        return
    measured = [
        *_harmless(images, check, detector, extractor),
        *_label_shift(images, labels, check, detector, extractor),
        *_stream(images, labels, check, detector, extractor, params, options.resplits),
        *_monitor_time(images, check),
    ]
    print("| what | measured |\n|---|---|")
    for name, value in measured:
        print(f"| {name} | {value} |")


def _harmless(
    images: Pixels, check: NDArray[np.int64], detector: Detector, extractor: Extractor
) -> Iterator[tuple[str, str]]:
    """Verdicts on windows that no person would call drifted."""
    changes: dict[str, Callable[[Pixels], Pixels]] = {
        "unchanged": lambda pixels: pixels,
        "JPEG, quality 90": lambda pixels: np.stack([_encoded(image, "JPEG", quality=90) for image in pixels]),
        "mirrored": lambda pixels: np.ascontiguousarray(pixels[:, :, ::-1]),
        "another resize filter": lambda pixels: np.stack([_resampled(image) for image in pixels]),
    }
    size = min(200, detector.largest_window)
    check = np.random.default_rng(detector.spec.seed).permutation(check)  # the pack is sorted by class
    for name, change in changes.items():
        said = []
        for start in range(0, len(check) - size + 1, size):
            pixels = change(images[check[start : start + size]])
            judged = detector.judge(extractor.features(pixels), extractor.adapted_logits(pixels, size))
            said.append(judged.status)
        counts = ", ".join(f"{said.count(status)} {status}" for status in ("ok", "benign", "harmful") if status in said)
        yield f"{name}: {len(said)} windows of {size}", counts


def _label_shift(
    images: Pixels, labels: NDArray[np.int64], check: NDArray[np.int64], detector: Detector, extractor: Extractor
) -> Iterator[tuple[str, str]]:
    """Verdicts on a stream that is sorted by class."""
    size = min(50, detector.largest_window)
    ordered = check[np.argsort(labels[check], kind="stable")]
    drifted, shifted, count = 0, 0, 0
    for start in range(0, len(ordered) - size + 1, size):
        pixels = images[ordered[start : start + size]]
        judged = detector.judge(extractor.features(pixels), extractor.adapted_logits(pixels, size))
        drifted, shifted, count = drifted + (judged.status != "ok"), shifted + judged.class_shift, count + 1
    yield f"sorted by class: {count} windows of {size}", f"{shifted} label shift, {drifted} image drift"


def _stream(
    images: Pixels,
    labels: NDArray[np.int64],
    check: NDArray[np.int64],
    detector: Detector,
    extractor: Extractor,
    params: Params,
    resplits: int,
) -> Iterator[tuple[str, str]]:
    """Run length to a false alarm over re-splits, and delay to an alarm on harmful drift."""
    size, alpha = _STREAM_WINDOW, _STREAM_WINDOW / _RUN_LENGTH
    if size > detector.largest_window:
        return
    clean = extractor.features(images)
    count = detector.num_windows(alpha)
    rates = false_alarms(clean, [size], params.drift.axes, alpha, resplits, count, params.drift.seed)[size]
    yield (
        f"images to a false alarm, {_RUN_LENGTH:,} asked for, {resplits} re-splits",
        f"{size / rates.mean:,.0f} ({rates.mean * resplits * count:.0f} alarms in {resplits * count * size:,} images)"
        if rates.mean
        else f"no alarm in {resplits * count * size:,}",
    )
    delays = []
    calibration = detector.calibration(size, alpha)
    before = measure(clean.rows(check), detector.projection)
    accuracy = float((clean.logits[check].argmax(axis=1) == labels[check]).mean())
    for kind in STANDARD_KINDS:
        for severity in (3, 4, 5):
            some = check[:400]
            features = extractor.features(corrupt(images[some], kind, severity, some, params.drift.seed))
            if accuracy - float((features.logits.argmax(axis=1) == labels[some]).mean()) <= detector.spec.max_drop:
                continue
            values = np.concatenate([before, measure(features, detector.projection)])
            rng = np.random.default_rng([params.drift.seed, severity])
            for trial in range(20):
                clean_part = rng.choice(len(before), size, replace=False)
                drifted_part = len(before) + rng.choice(len(some), 4 * size, replace=False)
                onset = trial % size  # images of the first window that came before the drift
                stream = np.concatenate([clean_part[:onset], drifted_part])
                windows = stream[: len(stream) // size * size].reshape(-1, size)
                p_values = calibration.p_values(evidence(detector.comparison, values, windows))
                alarm = int((p_values <= alpha).argmax()) if (p_values <= alpha).any() else len(windows)
                delays.append((alarm + 1) * size - onset)
    yield (
        f"images from the onset of harmful drift (severity 3 to 5) to the alarm, {len(delays)} streams",
        f"median {np.median(delays):.0f}, 90 % within {np.quantile(delays, 0.9):.0f}, longest {max(delays)}",
    )


def _torchdrift(
    images: Pixels, labels: NDArray[np.int64], check: NDArray[np.int64], detector: Detector, extractor: Extractor
) -> Iterator[tuple[str, str, str, str]]:
    """Alarms of TorchDrift's detectors and of ours: the same windows, TorchDrift's reference half of the check images.

    Its detectors see the embedding, as its documentation has them; 300 reference images, 500 permutations.
    """
    try:
        detectors = import_module("torchdrift.detectors")
    except ImportError as error:
        raise InputError(f"--torchdrift: {error}; pip install --no-deps torchdrift") from None
    size, alpha, num_clean, num_drifted = 50, 0.01, 200, 4
    if size > detector.largest_window or len(check) < 600:
        raise InputError(f"--torchdrift: windows of {size} need 600 check images, of which there are {len(check)}")
    torch.manual_seed(detector.spec.seed)
    rng = np.random.default_rng(detector.spec.seed)
    order = rng.permutation(check)
    reference = torch.from_numpy(extractor.features(images[order[:300]]).embedding)
    public = {
        "TorchDrift, kernel MMD": detectors.KernelMMDDriftDetector(n_perm=500),
        "TorchDrift, KS": detectors.KSDriftDetector(),
    }
    for each in public.values():
        each.fit(reference)
    rest = order[300:]
    calibration = detector.calibration(size, alpha)
    accuracy = float((extractor.features(images[rest]).logits.argmax(axis=1) == labels[rest]).mean())
    conditions = [(None, 0), *((kind, severity) for kind in STANDARD_KINDS for severity in (1, 2, 3, 4, 5))]
    alarms: dict[str, list[list[NDArray[np.bool_]]]] = {name: [[], [], []] for name in (*public, "Driftline")}
    for kind, severity in progress(conditions, "torchdrift", len(conditions), "condition"):
        some = rest[:400] if kind else rest
        pixels = corrupt(images[some], kind, severity, some, detector.spec.seed) if kind else images[some]
        features = extractor.features(pixels)
        harmful = accuracy - float((features.logits.argmax(axis=1) == labels[some]).mean()) > detector.spec.max_drop
        count = num_drifted if kind else num_clean
        windows = np.stack([rng.choice(len(some), size, replace=False) for _ in range(count)])
        found = evidence(detector.comparison, detector.population(features).values, windows)
        said = {"Driftline": calibration.p_values(found) <= alpha}
        embedding = torch.from_numpy(features.embedding)
        for name, each in public.items():
            said[name] = np.array([float(each.compute_p_value(embedding[rows])) <= alpha for rows in windows])
        for name, alarm in said.items():
            for group in (1, 2) if kind and harmful else (1,) if kind else (0,):
                alarms[name][group].append(alarm)
    for name, groups in alarms.items():
        clean, drifted, hurt = (f"{np.concatenate(group).mean():.3f}" if group else "" for group in groups)
        yield name, clean, drifted, hurt


def _monitor_time(images: Pixels, check: NDArray[np.int64]) -> Iterator[tuple[str, str]]:
    """The whole command on 200 JPEG files."""
    with tempfile.TemporaryDirectory() as folder:
        for row in check[:200]:
            Image.fromarray(np.array(images[row])).save(Path(folder) / f"{row}.jpg", quality=95)
        command = [sys.executable, "-m", "tools.monitor", folder, "--html", f"{folder}/report.html"]
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            subprocess.run(command, stdout=subprocess.DEVNULL, check=False)  # noqa: S603  # our own
            seconds.append(time.perf_counter() - start)
    yield (
        f"the monitor on {min(200, len(check))} images, imports and page included",
        f"{min(seconds):.1f} s (best of 3)",
    )


def _encoded(image: Pixels, kind: str, **options: int) -> Pixels:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return np.asarray(Image.open(buffer))


def _resampled(image: Pixels) -> Pixels:
    """As if a larger original had been made smaller with another filter."""
    height, width = image.shape[:2]
    larger = Image.fromarray(image).resize((width * 3 // 2, height * 3 // 2), Image.Resampling.BICUBIC)
    return np.asarray(larger.resize((width, height), Image.Resampling.LANCZOS))


if __name__ == "__main__":
    run_main(main, "benchmark.drift")
