"""The drift detector: what it remembers of clean images, how it is saved, and how it judges a window.

models/drift/
    detector.json        DetectorSpec
    arrays.safetensors   axes and ranks of the reference, measures and predicted classes of the threshold images
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy import stats

from stages.core.damage import (
    Baselines,
    Confusion,
    DamageModel,
    damage_inputs,
    probability_right,
    shifted_accuracy,
    true_classes,
)
from stages.core.errors import InputError
from stages.core.features import Features
from stages.core.image import CropMode, Interpolation
from stages.core.measures import Projection, measure_names
from stages.core.output import check_unaltered, disk_errors, replace_directory, sha256_of, write_json
from stages.core.params import Section
from stages.core.recipe import Precision
from stages.core.two_sample import (
    Calibration,
    Comparison,
    Indices,
    Population,
    Values,
    calibrate,
    class_shift,
    class_weights,
    compare_with,
    draw_windows,
    evidence,
    population_of,
    windows_of,
)

DETECTOR = Path("models/drift")
Status = Literal["ok", "benign", "harmful"]
LARGEST_SHARE = 0.25  # of the threshold images that a window may have
_MATCHED_IMAGES = 10  # of a window whose class mix has shifted, that must have their like among clean images, or all
_PERMUTATIONS = 1000  # at a time
_PLAINLY = 50  # permutations at or beyond the window, and times alpha, are enough to say that there is no shift
_EXCEEDANCES = 10  # clean windows at or beyond the threshold, at least
SMALLEST_WINDOW = 2  # images that anything can be said of


class SizedDamage(Section):
    """The damage estimate for windows of about one size."""

    window: int
    model: DamageModel
    error: float  # standard deviation of the estimate's error on unseen families, beside that of counting


class DetectorSpec(Section):
    """detector.json: what judging takes beside the arrays."""

    class_ids: list[str]
    classifier_sha256: str | None  # of the model.safetensors that it was calibrated for
    image_size: int  # side in pixels of the images that are looked at
    crop_mode: CropMode
    interpolation: Interpolation
    precision: Precision  # that the model computes in
    alpha: float
    max_drop: float
    null_windows: int
    seed: int
    baselines: Baselines
    confusion: Confusion
    damage: list[SizedDamage]  # by window size
    adapts: bool  # whether the model has batch norms, so that it can be asked a second time
    sha256: str | None = None  # of arrays.safetensors; None before it is saved


class Moved(NamedTuple):
    """How far a measure moved."""

    name: str
    shift: float  # of its mean, in standard deviations of the reference
    evidence: float  # Kolmogorov-Smirnov, as -log10 p


class Judgement(NamedTuple):
    """What the detector says of a window."""

    status: Status
    p_value: float
    num_tested: int  # images that the test compared
    class_p_value: float
    class_shift: bool
    same_mix: bool  # whether the images were compared with clean ones of their own class mix, where it has shifted
    accuracy: float
    low: float  # 95 % interval
    high: float
    drop: float
    moved: list[Moved]


@dataclass(frozen=True)
class Detector:
    """A calibrated detector."""

    spec: DetectorSpec
    projection: Projection
    threshold: Population
    labels: Indices  # (N,) true classes of the threshold images
    comparison: Comparison

    @property
    def largest_window(self) -> int:
        """Images of the largest window that can be tested."""
        return max(SMALLEST_WINDOW, int(LARGEST_SHARE * len(self.threshold)))

    @property
    def largest_fitted(self) -> int:
        """The largest window with a damage estimate of its own: of a model adapted to many more, it says little."""
        return max(sized.window for sized in self.spec.damage)

    def population(self, features: Features) -> Population:
        """Images as the tests see them."""
        return population_of(features, self.projection)

    def num_windows(self, alpha: float) -> int:
        """Clean windows to draw, so that p-values reach well below alpha."""
        # Rounded up: with fewer, one exceedance less is allowed. 1e-9 is what a whole quotient may be off by.
        return max(self.spec.null_windows, int(np.ceil(_EXCEEDANCES / alpha - 1e-9)) - 1)

    def calibration(self, size: int, alpha: float | None = None) -> Calibration:
        """The evidence of clean windows of a size, as many as p-values of alpha (by default the detector's) take."""
        rng = np.random.default_rng([self.spec.seed, size])
        windows = draw_windows(len(self.threshold), size, self.num_windows(alpha or self.spec.alpha), rng)
        return calibrate(evidence(self.comparison, self.threshold.values, windows, inside=True))

    def class_p_value(self, classes: Indices, alpha: float | None = None) -> float:
        """p-value of the predicted class mix of a window (n,), by permutation of window and threshold images.

        Exact whatever the number of classes, rare ones included. It stops early where the mix is plainly none that
        alpha would be an alarm for (Besag and Clifford 1991).
        """
        alpha = alpha or self.spec.alpha
        num_classes = len(self.spec.class_ids)
        window = np.bincount(classes, minlength=num_classes)
        pool = window + np.bincount(self.threshold.classes, minlength=num_classes)
        found = class_shift(window[None], pool)[0] - 1e-9
        rng = np.random.default_rng([self.spec.seed, len(classes), 1])
        drawn = exceeded = 0
        while drawn < self.num_windows(alpha) and exceeded < max(_PLAINLY, _PLAINLY * alpha * drawn):
            number = min(_PERMUTATIONS, self.num_windows(alpha) - drawn)
            mixes = rng.multivariate_hypergeometric(pool, len(classes), size=number, method="marginals")
            exceeded += int((class_shift(mixes, pool) >= found).sum())
            drawn += number
        return (1 + exceeded) / (1 + drawn)

    def matched_p_value(self, window: Population, alpha: float | None = None) -> tuple[float, int] | None:
        """p-value against clean images of the window's own class mix, and the number of images compared.

        The true classes of its images, and so of the clean windows that it is compared with, are drawn given the
        predicted ones. None where fewer than ten images (of a smaller window: all) have their like among the clean.
        """
        rng = np.random.default_rng([self.spec.seed, len(window), 2])
        there = np.bincount(self.labels, minlength=len(self.spec.class_ids))
        # By the class that an image truly has: those predicted as a class are others when the mix is another.
        shares = true_classes(self.spec.confusion, window.classes) * (there > 0)[:, None]
        kept = np.flatnonzero(shares.sum(axis=0)[window.classes] > 0.5)
        # Half of the clean images of a class at most, so that the rest can be compared with.
        expected = shares[:, window.classes[kept]].sum(axis=1)
        number = int(min(1.0, (there / 2 / np.maximum(expected, 1e-9))[there > 0].min()) * len(kept))
        if number < min(_MATCHED_IMAGES, len(window)):
            return None
        some = window.rows(np.sort(rng.permutation(kept)[:number]))
        count = self.num_windows(alpha or self.spec.alpha)
        labels = np.stack([_draw(shares[:, predicted], count, rng) for predicted in some.classes], axis=1)
        windows = windows_of(labels, self.labels, rng)
        weights = class_weights(shares[:, some.classes].sum(axis=1), self.labels)
        comparison = compare_with(self.threshold, self.projection, weights)
        calibrated = calibrate(evidence(comparison, self.threshold.values, windows, inside=True))
        found = evidence(comparison, some.values, np.arange(len(some))[None])
        return float(calibrated.p_values(found)[0]), len(some)

    def estimate(self, logits: NDArray[np.float32], adapted: NDArray[np.float32] | None) -> tuple[float, float, float]:
        """Estimated accuracy of a window and its 95 % interval."""
        sized = nearest_size(self.spec.damage, len(logits))
        probabilities = probability_right(sized.model, damage_inputs(logits, adapted))
        accuracy = float(probabilities.mean())
        counting = float((probabilities * (1 - probabilities)).mean()) / len(logits)
        margin = 1.96 * (sized.error**2 + counting) ** 0.5
        return accuracy, max(0.0, accuracy - margin), min(1.0, accuracy + margin)

    def judge(
        self,
        features: Features,
        adapted: NDArray[np.float32] | None,
        alpha: float | None = None,
        calibration: Calibration | None = None,
    ) -> Judgement:
        """Judge a window of images; of more than `largest_window`, evenly spaced ones are tested.

        A calibration for the window's size saves computing it anew.
        """
        alpha = self.spec.alpha if alpha is None else alpha
        everything = self.population(features)
        tested = everything
        if len(everything) > self.largest_window:
            tested = everything.rows(np.linspace(0, len(everything) - 1, self.largest_window).round().astype(np.int64))
        rows = np.arange(len(tested))[None]
        found = evidence(self.comparison, tested.values, rows)
        class_p_value = self.class_p_value(tested.classes, alpha)
        shifted = class_p_value <= alpha
        matched = self.matched_p_value(tested, alpha) if shifted else None
        if matched is not None:
            p_value, num_tested = matched
        else:
            calibration = calibration or self.calibration(len(tested), alpha)
            p_value, num_tested = float(calibration.p_values(found)[0]), len(tested)
        accuracy, low, high = self.estimate(features.logits, adapted)
        if shifted and p_value > alpha:
            # A window of few classes is nothing to adapt to; as the images look like clean ones, their classes tell.
            accuracy, error = shifted_accuracy(self.spec.confusion, everything.classes)
            counting = accuracy * (1 - accuracy) / len(everything)
            margin = 1.96 * (error**2 + counting) ** 0.5
            low, high = max(0.0, accuracy - margin), min(1.0, accuracy + margin)
        drop = self.spec.baselines.accuracy - accuracy
        return Judgement(
            status=verdict(p_value <= alpha, drop, self.spec.max_drop),
            p_value=p_value,
            num_tested=num_tested,
            class_p_value=class_p_value,
            class_shift=shifted,
            same_mix=not shifted or matched is not None,
            accuracy=accuracy,
            low=low,
            high=high,
            drop=drop,
            moved=self.moved(tested),
        )

    def moved(self, window: Population) -> list[Moved]:
        """The measures that have a name of their own, the most moved first."""
        result = []
        for column, name in enumerate(measure_names(self.projection)):
            if name.removeprefix("embedding_").isdigit():
                continue
            clean, values = self.threshold.values[:, column], window.values[:, column]
            p_value = max(float(stats.ks_2samp(clean, values, method="asymp").pvalue), 1e-300)
            result.append(Moved(name, float(values.mean() - clean.mean()), float(-np.log10(p_value))))
        return sorted(result, key=lambda moved: -moved.evidence)

    def oddness(self, window: Population) -> Values:
        """How far each image is from the reference (N,): mean of its squared normal scores, 1 for a usual one."""
        squares: Values = (window.values**2).mean(axis=1)
        return squares


def verdict(drifted: bool, drop: float, max_drop: float) -> Status:
    """The decision of a window."""
    if not drifted:
        return "ok"
    return "harmful" if drop > max_drop else "benign"


def nearest_size(damage: Sequence[SizedDamage], size: int) -> SizedDamage:
    """The estimate for the window size nearest to `size` by ratio."""
    return min(damage, key=lambda sized: abs(np.log(sized.window / size)))


def build(spec: DetectorSpec, projection: Projection, threshold: Population, labels: Indices) -> Detector:
    """A detector of its parts."""
    return Detector(spec, projection, threshold, labels, compare_with(threshold, projection))


def save(folder: Path, detector: Detector) -> None:
    """Write a detector directory that appears whole or not at all."""
    arrays = {f"projection.{name}": values for name, values in detector.projection._asdict().items()}
    arrays |= {"threshold.values": detector.threshold.values, "threshold.classes": detector.threshold.classes}
    arrays["threshold.labels"] = detector.labels
    with replace_directory(folder) as out:
        with disk_errors(folder):
            save_file({name: np.ascontiguousarray(each) for name, each in arrays.items()}, out / "arrays.safetensors")
        spec = detector.spec.model_copy(update={"sha256": sha256_of(out / "arrays.safetensors")})
        write_json(out / "detector.json", spec.model_dump())


def load(folder: Path = DETECTOR) -> Detector:
    """Read a detector directory; InputError when it is missing or damaged."""
    path = folder / "detector.json"
    try:
        spec = DetectorSpec.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: not found; run `dvc repro drift` (or `dvc checkout`)") from None
    except ValidationError as error:
        raise InputError(f"{path}: not written by this version; run `dvc repro drift`: {error}") from None
    path = folder / "arrays.safetensors"
    try:
        arrays = load_file(path)
        projection = Projection(**{name: arrays[f"projection.{name}"] for name in Projection._fields})
        threshold = Population(arrays["threshold.values"], arrays["threshold.classes"])
        detector = build(spec, projection, threshold, arrays["threshold.labels"])
    except (OSError, SafetensorError, KeyError, IndexError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}; run `dvc repro drift`") from None
    check_unaltered(path, spec.sha256, "drift")
    return detector


def _draw(shares: Values, count: int, rng: np.random.Generator) -> Indices:
    """`count` classes, drawn by their shares (num_classes,)."""
    return rng.choice(len(shares), size=count, p=shares / shares.sum())
