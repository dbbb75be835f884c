"""How well a detector works: measured on clean images that it has never seen, and on simulated drift of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from stages.core.corruptions import FAMILIES, SEVERITIES, Family, corrupt
from stages.core.damage import (
    Baselines,
    DamageModel,
    baseline_estimates,
    damage_inputs,
    fit_damage,
    probability_right,
)
from stages.core.detector import LARGEST_SHARE, SMALLEST_WINDOW, Detector, SizedDamage, nearest_size
from stages.core.features import Extractor, Features
from stages.core.measures import fit_projection
from stages.core.parallel import read_ahead
from stages.core.progress import progress
from stages.core.two_sample import (
    Calibration,
    Indices,
    Population,
    Values,
    calibrate,
    compare_with,
    draw_windows,
    evidence,
    population_of,
    squared_mmd,
)

REFERENCE_SHARE, THRESHOLD_SHARE = 0.15, 0.425  # of the clean images; the rest checks
_MOST_IMAGES = 4000  # to calibrate, and to check: a kernel matrix of them is 128 MB
CONTAMINATED_ALPHA = 0.05  # at which windows that are drifted in part are counted
_NUM_WINDOWS = 100  # that a rate is taken over
_ESTIMATED_IMAGES = 100  # at least, to check the estimate with


class Parts(NamedTuple):
    """Disjoint indices of clean images: to fit axes and the damage estimate, to calibrate, and to check with."""

    reference: Indices
    threshold: Indices
    check: Indices


class Condition(NamedTuple):
    """What is done to which images; severity 0 does nothing."""

    kind: str
    severity: int
    indices: Indices  # of the clean images
    groups: dict[int, int]  # how many of them the model is adapted to, by group size


class Drifted(NamedTuple):
    """Images under one condition: features, and what the adapted model says by window size."""

    kind: str
    severity: int
    indices: Indices  # of the clean images
    features: Features
    adapted: dict[int, NDArray[np.float32] | None]  # by group size, of the first images


def split(num_images: int, rng: np.random.Generator) -> Parts:
    """Split clean images at random; of very many, some are in no part."""
    order = rng.permutation(num_images)
    first = round(REFERENCE_SHARE * num_images)
    second = first + min(round(THRESHOLD_SHARE * num_images), _MOST_IMAGES)
    third = second + _MOST_IMAGES
    return Parts(*(np.sort(part) for part in (order[:first], order[first:second], order[second:third])))


def possible_sizes(wanted: Sequence[int], parts: Parts, num_corrupted: int) -> list[int]:
    """The window sizes that the images, and those corrupted a condition, allow to calibrate and check; at least one."""
    allowed = int(LARGEST_SHARE * len(parts.threshold)), len(parts.check) // 2, num_corrupted
    largest = max(SMALLEST_WINDOW, min(allowed))
    return [size for size in wanted if size <= largest] or [largest]


def adapted_images(sizes: Sequence[int], num_images: int) -> dict[int, int]:
    """How many images the estimate is checked on, by window size: at least two windows, where there are as many."""
    wanted = {size: max(2 * size, _ESTIMATED_IMAGES) for size in sizes if size <= num_images}
    return {size: min(count, num_images) // size * size for size, count in wanted.items()}


def kinds_and_severities() -> list[tuple[str, int]]:
    """Every condition."""
    return [(kind, severity) for kind in FAMILIES for severity in SEVERITIES]


def simulate(
    images: NDArray[np.uint8],
    chosen: Sequence[Condition],
    extractor: Extractor,
    seed: int,
) -> Iterator[Drifted]:
    """Corrupt images (N, H, W, 3) and look at them, one condition after the other.

    The next condition is corrupted while one is looked at.
    """

    def corrupted(condition: Condition) -> NDArray[np.uint8]:
        some = images[condition.indices]
        if condition.severity == 0:
            return some
        return corrupt(some, condition.kind, condition.severity, condition.indices, seed)

    for condition, pixels in zip(chosen, read_ahead(corrupted, chosen, 1), strict=True):
        adapted = {size: extractor.adapted_logits(pixels[:count], size) for size, count in condition.groups.items()}
        yield Drifted(condition.kind, condition.severity, condition.indices, extractor.features(pixels), adapted)


class AlarmRates(NamedTuple):
    """Share of clean windows that raise an alarm, over re-splits."""

    mean: float
    worst: float
    rates: list[float]


def false_alarms(
    features: Features, sizes: Sequence[int], num_axes: int, alpha: float, resplits: int, num_windows: int, seed: int
) -> dict[int, AlarmRates]:
    """Split clean images anew, calibrate, and count alarms on windows of the images left over, by window size."""
    rates: dict[int, list[float]] = {size: [] for size in sizes}
    for number in progress(range(resplits), "drift: false alarms", resplits, "split"):
        rng = np.random.default_rng([seed, number])
        parts = split(len(features), rng)
        projection = fit_projection(features.rows(parts.reference), num_axes)
        threshold = population_of(features.rows(parts.threshold), projection)
        check = population_of(features.rows(parts.check), projection)
        comparison = compare_with(threshold, projection)
        for size in sizes:
            null = draw_windows(len(threshold), size, num_windows, rng)
            calibration = calibrate(evidence(comparison, threshold.values, null, inside=True))
            found = evidence(comparison, check.values, draw_windows(len(check), size, num_windows, rng))
            rates[size].append(float((calibration.p_values(found) <= alpha).mean()))
    return {size: AlarmRates(float(np.mean(some)), max(some), some) for size, some in rates.items()}


class Estimate(NamedTuple):
    """Estimated and true accuracy of one window of a condition."""

    kind: str
    severity: int
    window: int
    true: float
    estimates: dict[str, float]  # by method
    low: float
    high: float


def fit_sized_damage(
    simulated: Sequence[Drifted], labels: NDArray[np.int64], size: int
) -> tuple[SizedDamage, dict[Family, DamageModel]]:
    """Fit the damage estimate for a window size, once to all simulated families and once without each of them.

    The error is the standard deviation over conditions of families that a fit has not seen, beside what counting a
    window's images gives.
    """
    inputs, answers = {}, {}
    for one in simulated:
        adapted = one.adapted[size]
        count = len(one.features) if adapted is None else len(adapted)
        inputs[one.kind, one.severity] = damage_inputs(one.features.logits[:count], adapted)
        answers[one.kind, one.severity] = is_right(one, labels)[:count]

    def fit(keys: Sequence[tuple[str, int]]) -> DamageModel:
        return fit_damage(np.concatenate([inputs[key] for key in keys]), np.concatenate([answers[key] for key in keys]))

    keys = list(inputs)
    families: list[Family] = sorted(set(FAMILIES.values()))
    without = {
        family: fit([key for key in keys if key[0] not in FAMILIES or FAMILIES[key[0]] != family])
        for family in families
    }
    excess = []
    for kind, severity in keys:
        if kind in FAMILIES:
            probabilities = probability_right(without[FAMILIES[kind]], inputs[kind, severity])
            some = answers[kind, severity]
            counting = float((probabilities * (1 - probabilities)).mean()) / len(some)
            excess.append((float(probabilities.mean()) - float(some.mean())) ** 2 - counting)
    error = max(float(np.mean(excess)), 0.0) ** 0.5
    return SizedDamage(window=size, model=fit(keys), error=error), without


def is_right(drifted: Drifted, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether the model predicts each image of a condition right; labels of all clean images."""
    right: NDArray[np.bool_] = drifted.features.logits.argmax(axis=1) == labels[drifted.indices]
    return right


def estimates_of(
    drifted: Drifted,
    labels: NDArray[np.int64],
    size: int,
    sized: SizedDamage,
    unseen: DamageModel,
    baselines: Baselines,
) -> Iterator[Estimate]:
    """Estimates on the windows of a condition, by the model that has not seen its family and by the baselines."""
    right = is_right(drifted, labels)
    adapted = drifted.adapted[size]
    count = len(right) if adapted is None else len(adapted)
    for start in range(0, count - size + 1, size):
        rows = slice(start, start + size)
        logits = drifted.features.logits[rows]
        probabilities = probability_right(unseen, damage_inputs(logits, None if adapted is None else adapted[rows]))
        estimate = float(probabilities.mean())
        margin = 1.96 * (sized.error**2 + float((probabilities * (1 - probabilities)).mean()) / size) ** 0.5
        yield Estimate(
            drifted.kind,
            drifted.severity,
            size,
            float(right[rows].mean()),
            {"adapted": estimate} | baseline_estimates(logits, baselines),
            estimate - margin,
            estimate + margin,
        )


def softmax_ks_alarms(reference: Values, probabilities: Values, windows: Indices, alpha: float) -> float:
    """BBSDs of Rabanser, Guenzburger and Lipton 2019 ("Failing Loudly"): share of windows with an alarm.

    Kolmogorov-Smirnov on each softmax output (N, num_classes) against those of the reference, with Bonferroni's
    correction over the outputs.
    """
    num_classes, size = reference.shape[1], windows.shape[1]
    smallest = np.ones(len(windows))
    effective = np.sqrt(size * len(reference) / (size + len(reference)))
    ranks = np.arange(1, size + 1)[None] / size
    for label in range(num_classes):
        ordered = np.sort(reference[:, label])
        shares = np.sort(np.searchsorted(ordered, probabilities[:, label], "right")[windows] / len(ordered), axis=1)
        distance = np.maximum((ranks - shares).max(axis=1), (shares - (ranks - 1 / size)).max(axis=1))
        smallest = np.minimum(smallest, stats.kstwobign.sf((effective + 0.12 + 0.11 / effective) * distance))
    return float((smallest * num_classes <= alpha).mean())


class Gauge(NamedTuple):
    """A detector and what comparing it on many conditions takes, computed once."""

    detector: Detector
    calibrations: dict[int, Calibration]  # by window size
    mmd_limits: dict[int, float]  # of the plain embedding MMD, by window size
    clean: Population  # check images
    probabilities: Values  # their softmax
    labels: NDArray[np.int64]  # of all clean images
    unseen: dict[int, dict[Family, DamageModel]]  # damage estimates that have not seen a family, by window size


def gauge(
    detector: Detector,
    sizes: Sequence[int],
    clean: Features,
    labels: NDArray[np.int64],
    unseen: dict[int, dict[Family, DamageModel]],
) -> Gauge:
    """Calibrate a detector, and the plain embedding MMD that it is compared with, for window sizes."""
    limits = {}
    count = len(detector.threshold)
    for size in sizes:
        rng = np.random.default_rng([detector.spec.seed, size])
        null = draw_windows(count, size, detector.num_windows(detector.spec.alpha), rng)
        inside = squared_mmd(detector.comparison, detector.threshold.values, null) * (count / (count - size)) ** 2
        limits[size] = float(np.quantile(inside, 1 - detector.spec.alpha, method="higher"))
    return Gauge(
        detector,
        {size: detector.calibration(size) for size in sizes},
        limits,
        detector.population(clean),
        special.softmax(clean.logits.astype(np.float64), axis=1),
        labels,
        unseen,
    )


class Measured(NamedTuple):
    """What one condition did to the classifier, and what the detector said."""

    kind: str
    severity: int
    accuracy: float
    detected: dict[int, float]  # share of windows with an alarm, by size
    contaminated: dict[float, float]  # the same of the largest windows, by the share of their images that are drifted
    baselines: dict[str, dict[int, float]]  # of public methods, by name and size
    estimates: list[Estimate]


def measure_condition(drifted: Drifted, gauge: Gauge, contamination: Sequence[float]) -> Measured:
    """Measure detection and estimates under one condition."""
    detector = gauge.detector
    population = detector.population(drifted.features)
    usable = {size: calibration for size, calibration in gauge.calibrations.items() if size <= len(population)}
    largest = max(gauge.calibrations)
    family = FAMILIES[drifted.kind]
    estimates = [
        estimate
        for size in drifted.adapted
        for estimate in estimates_of(
            drifted,
            gauge.labels,
            size,
            nearest_size(detector.spec.damage, size),
            gauge.unseen[size][family],
            detector.spec.baselines,
        )
    ]
    contaminated = {
        share: alarm_rate(gauge, population, largest, CONTAMINATED_ALPHA, share)
        for share in contamination
        if 0 < round(share * largest) <= len(population) and largest - round(share * largest) <= len(gauge.clean)
    }
    return Measured(
        drifted.kind,
        drifted.severity,
        float(is_right(drifted, gauge.labels).mean()),
        {size: alarm_rate(gauge, population, size, detector.spec.alpha) for size in usable},
        contaminated,
        public_methods(gauge, usable, drifted.features, population),
        estimates,
    )


def alarm_rate(gauge: Gauge, drifted: Population, size: int, alpha: float, share: float = 1.0) -> float:
    """Share of windows that raise an alarm, where `share` of each window's images are drifted."""
    rng = np.random.default_rng([gauge.detector.spec.seed, size, 3])
    number = round(share * size)
    windows = draw_windows(len(drifted), number, _NUM_WINDOWS, rng)
    values = drifted.values
    if number < size:
        others = draw_windows(len(gauge.clean), size - number, _NUM_WINDOWS, rng)
        used, rows = np.unique(others, return_inverse=True)
        values = np.concatenate([values, gauge.clean.values[used]])
        windows = np.concatenate([windows, len(drifted) + rows.reshape(others.shape)], axis=1)
    found = evidence(gauge.detector.comparison, values, windows)
    return float((gauge.calibrations[size].p_values(found) <= alpha).mean())


def public_methods(
    gauge: Gauge, sizes: Iterable[int], features: Features, population: Population
) -> dict[str, dict[int, float]]:
    """Alarm rates of two published detectors on windows of the same images, by name and window size."""
    probabilities = special.softmax(features.logits.astype(np.float64), axis=1)
    alpha = gauge.detector.spec.alpha
    rates: dict[str, dict[int, float]] = {"bbsds_ks": {}, "embedding_mmd": {}}
    for size in sizes:
        rng = np.random.default_rng([gauge.detector.spec.seed, size, 3])
        windows = draw_windows(len(population), size, _NUM_WINDOWS, rng)
        rates["bbsds_ks"][size] = softmax_ks_alarms(gauge.probabilities, probabilities, windows, alpha)
        found = squared_mmd(gauge.detector.comparison, population.values, windows)
        rates["embedding_mmd"][size] = float((found > gauge.mmd_limits[size]).mean())
    return rates
