"""Do the images of a window come from the population of the reference? Several tests, one calibrated p-value.

On each window: two-sample Kolmogorov-Smirnov by measure, the shift of the mean by group of measures (Hotelling's T2),
and kernel MMD of the embedding (Gretton et al. 2012). Each becomes evidence, -log p in its own approximation, and the
sum (Fisher's method) is compared with that of windows of clean images. So the approximations and the dependence between
the tests cost power at most: the false-alarm rate is that of the resampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from stages.core.features import Features
from stages.core.measures import TESTED_GROUPS, Projection, measure, measure_groups

Values = NDArray[np.float64]
Indices = NDArray[np.int64]
Evidence = dict[str, Values]  # by test, of each window (B,): larger for more drift

_CHUNK = 4_000_000  # numbers that are drawn or sorted at once
_BANDWIDTH_IMAGES = 500


@dataclass(frozen=True)
class Population:
    """Images by their measures (N, num_measures) and by the class that the model predicts (N,)."""

    values: Values
    classes: Indices

    def __len__(self) -> int:
        return len(self.values)

    def rows(self, indices: Indices) -> Population:
        """Some of the images."""
        return Population(self.values[indices], self.classes[indices])


def population_of(features: Features, projection: Projection) -> Population:
    """Images as the tests see them."""
    return Population(measure(features, projection), features.logits.argmax(axis=1).astype(np.int64))


@dataclass(frozen=True)
class Comparison:
    """A weighted population of R images, prepared for comparing many windows with it."""

    groups: dict[str, slice]
    mean: Values  # (num_measures,)
    precision: dict[str, Values]  # by group, inverse covariance
    ordered: Values  # (R, num_measures) sorted columns
    cumulative: Values  # (R + 1, num_measures) weight of the images before each
    points: Values  # (R, num_axes) where the kernel is taken
    weights: Values  # (R,), sum 1
    bandwidth: float  # squared, of the kernel
    similarity: float  # mean kernel value of two of its images
    size: float  # effective number of images


def compare_with(population: Population, projection: Projection, weights: Values | None = None) -> Comparison:
    """Prepare a population for comparison, by default with equal weights.

    Nothing is fitted to the population: else its own windows would look more usual than fresh ones.
    """
    values = population.values
    weights = np.full(len(values), 1 / len(values)) if weights is None else weights
    order = np.argsort(values, axis=0, kind="stable")
    cumulative = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(weights[order], axis=0)])
    groups = measure_groups(projection)
    points = values[:, groups["axes"]]
    some = points[:_BANDWIDTH_IMAGES]
    bandwidth = float(np.median(_squared_distances(some, some))) or 1.0  # the median heuristic
    kernel = np.exp(-_squared_distances(points, points) / bandwidth)
    return Comparison(
        groups=groups,
        mean=weights @ values,
        precision={name: projection.precision[groups[name], groups[name]] for name in TESTED_GROUPS},
        ordered=np.take_along_axis(values, order, axis=0),
        cumulative=cumulative,
        points=points,
        weights=weights,
        bandwidth=bandwidth,
        similarity=float(weights @ kernel @ weights),
        size=float(1 / (weights**2).sum()),
    )


def evidence(comparison: Comparison, values: Values, windows: Indices, inside: bool = False) -> Evidence:
    """Evidence of drift in windows (B, n), which are rows of `values` (N, num_measures).

    inside: `values` is the compared population itself, and each window is compared with the rest of it. Distribution
    functions, means and mean embeddings of the rest are linear in those of the whole: their differences stretch.
    """
    size = windows.shape[1]
    stretch = comparison.size / (comparison.size - size) if inside else 1.0
    others = comparison.size - size if inside else comparison.size
    effective = size * others / (size + others)
    root = np.sqrt(effective)
    distances, means = _distances_and_means(comparison, values, windows)
    # Stephens' form of the asymptotic distribution, good from a handful of images on.
    scaled = (root + 0.12 + 0.11 / root) * np.minimum(stretch * distances, 1.0)
    logarithms = -np.log(np.maximum(stats.kstwobign.sf(scaled), 1e-300))
    shifts = stretch * (means - comparison.mean)
    found = {}
    for name in TESTED_GROUPS:
        columns = comparison.groups[name]
        some = shifts[:, columns]
        found[f"ks_{name}"] = logarithms[:, columns].max(axis=1)
        found[f"mean_{name}"] = np.einsum("bi,ij,bj->b", some, comparison.precision[name], some) * effective
    found["mmd"] = squared_mmd(comparison, values, windows) * stretch**2 * effective
    return found


@dataclass(frozen=True)
class Calibration:
    """What windows of clean images give: with it, evidence becomes a p-value."""

    moments: dict[str, tuple[float, float]]  # mean and variance of the statistics without an approximation of their own
    combined: Values  # (B,) sorted

    def p_values(self, found: Evidence) -> Values:
        """(1 + k) / (1 + B) of each window, k the number of clean windows with at least as much evidence."""
        below = np.searchsorted(self.combined, _combine(found, self.moments), "left")
        p_values: Values = (1 + len(self.combined) - below) / (1 + len(self.combined))
        return p_values


def calibrate(found: Evidence) -> Calibration:
    """Calibrate with the evidence of clean windows."""
    quadratic = {name: values for name, values in found.items() if not name.startswith("ks_")}
    moments = {name: (float(values.mean()), float(values.var()) + 1e-12) for name, values in quadratic.items()}
    return Calibration(moments, np.sort(_combine(found, moments)))


def draw_windows(num_images: int, size: int, count: int, rng: np.random.Generator) -> Indices:
    """`count` windows of `size` different images each: indices (count, size)."""
    step = max(1, _CHUNK // num_images)
    parts = [rng.random((min(step, count - start), num_images), dtype=np.float32) for start in range(0, count, step)]
    return np.concatenate([np.argpartition(part, size - 1, axis=1)[:, :size] for part in parts])


def windows_of(labels: Indices, pool: Indices, rng: np.random.Generator) -> Indices:
    """Windows (B, n) of images of a pool, which is of classes (N,): at each place, one of the class in `labels` (B, n).

    The images of a window differ, unless it has more of a class than the pool.
    """
    windows = np.empty(labels.shape, dtype=np.int64)
    for label in np.unique(labels):
        candidates, places = np.flatnonzero(pool == label), labels == label
        counts = places.sum(axis=1)
        most = int(counts.max())
        drawn = draw_windows(len(candidates), min(most, len(candidates)), len(labels), rng)
        order = rng.permuted(drawn, axis=1)[:, np.arange(most) % len(candidates)]
        windows[places] = candidates[order[np.arange(most) < counts[:, None]]]
    return windows


def class_weights(counts: Values, pool: Indices) -> Values:
    """Weights (N,) under which a pool of classes (N,) has a mix of classes (num_classes,), whatever its sum."""
    weights = (counts / np.maximum(np.bincount(pool, minlength=len(counts)), 1))[pool]
    normalised: Values = weights / weights.sum()
    return normalised


def class_shift(counts: Indices, pool: Indices) -> Values:
    """Likelihood ratio (G) of class counts (B, num_classes) against the rest of a pool (num_classes,): (B,)."""
    rest = pool - counts
    statistic: Values = np.zeros(len(counts))
    for some in (counts, rest):
        expected = some.sum(axis=1, keepdims=True) * np.maximum(pool / pool.sum(), 1e-300)
        statistic += 2 * special.xlogy(some, some / expected).sum(axis=1)
    return statistic


def _distances_and_means(comparison: Comparison, values: Values, windows: Indices) -> tuple[Values, Values]:
    """Kolmogorov-Smirnov distance and mean of every measure of every window: twice (B, num_measures)."""
    size, num_measures = windows.shape[1], values.shape[1]
    # Weight of the population below each value, and up to it: they differ where values are tied.
    below, up_to = np.empty(values.shape, dtype=np.float32), np.empty(values.shape, dtype=np.float32)
    for column in range(num_measures):
        ordered, cumulative = comparison.ordered[:, column], comparison.cumulative[:, column]
        below[:, column] = cumulative[np.searchsorted(ordered, values[:, column], "left")]
        up_to[:, column] = cumulative[np.searchsorted(ordered, values[:, column], "right")]
    distances = np.empty((len(windows), num_measures))
    means = np.empty((len(windows), num_measures))
    ranks = (np.arange(1, size + 1, dtype=np.float32) / size)[None, :, None]
    step = max(1, _CHUNK // (size * num_measures))
    for start in range(0, len(windows), step):
        some = windows[start : start + step]
        means[start : start + step] = values[some].mean(axis=1)
        above = (ranks - np.sort(up_to[some], axis=1)).max(axis=1)
        under = (np.sort(below[some], axis=1) - (ranks - np.float32(1 / size))).max(axis=1)
        distances[start : start + step] = np.maximum(above, under)
    return distances, means


def squared_mmd(comparison: Comparison, values: Values, windows: Indices) -> Values:
    """Squared maximum mean discrepancy of the embedding, Gaussian kernel, of each window (B,), rows of `values`.

    The estimate is biased, alike for all windows of a size.
    """
    points = values[:, comparison.groups["axes"]]
    inner = np.exp(-_squared_distances(points, points) / comparison.bandwidth)
    cross = np.exp(-_squared_distances(points, comparison.points) / comparison.bandwidth) @ comparison.weights
    squared = np.empty(len(windows))
    step = max(1, _CHUNK // len(points))
    for start in range(0, len(windows), step):
        some = windows[start : start + step]
        membership = np.zeros((len(some), len(points)))
        np.add.at(membership, (np.arange(len(some))[:, None], some), 1 / some.shape[1])
        within = ((membership @ inner) * membership).sum(axis=1)
        squared[start : start + step] = np.maximum(within - 2 * membership @ cross + comparison.similarity, 0)
    return squared


def _squared_distances(a: Values, b: Values) -> Values:
    squares: Values = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None, :] - 2 * a @ b.T
    return np.maximum(squares, 0)


def _combine(found: Evidence, moments: dict[str, tuple[float, float]]) -> Values:
    """Sum of -log p over the tests (B,); of quadratic statistics by the gamma distribution of their moments."""
    total: Values = np.zeros(len(next(iter(found.values()))))
    for name, values in found.items():
        if name in moments:
            mean, variance = moments[name]
            if mean <= 0:  # constant in the population, and so no test
                continue
            total += np.minimum(-stats.gamma.logsf(values, mean**2 / variance, scale=variance / mean), 1e6)
        else:
            total += values
    return total
