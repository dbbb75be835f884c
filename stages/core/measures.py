"""Features of an image as numbers that tests can compare: looks, outputs, and the embedding in its own axes.

Every measure ends as a normal score: the normal quantile of its rank among the reference images. So measures of any
distribution weigh alike, and no outlier can carry a mean.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.covariance import ledoit_wolf

from stages.core.features import Features
from stages.core.image_statistics import STATISTICS

OUTPUTS = ("confidence", "entropy", "energy")
TESTED_GROUPS = ("image", "output", "embedding")
_RIDGE = 1e-3  # share of the variances, added where a covariance is inverted
_FLOOR = 1e-6


class Projection(NamedTuple):
    """Axes and ranks that are fitted to R reference images."""

    centre: NDArray[np.float64]  # (dim,) of the embedding
    axes: NDArray[np.float64]  # (dim, num_axes), principal axes of the embedding, orthonormal
    deviations: NDArray[np.float64]  # (num_axes,) standard deviation along each
    image_centre: NDArray[np.float64]  # (len(STATISTICS),)
    image_whitening: NDArray[np.float64]  # (len(STATISTICS), len(STATISTICS))
    ordered: NDArray[np.float64]  # (R, num_measures) sorted measures of the reference
    precision: NDArray[np.float64]  # (num_measures, num_measures) inverse covariance of normal scores, by group


def fit_projection(features: Features, num_axes: int) -> Projection:
    """Fit to at least two reference images; a quarter as many axes as images at most."""
    embedding = features.embedding.astype(np.float64)
    centre = embedding.mean(axis=0)
    _, singular, axes = np.linalg.svd(embedding - centre, full_matrices=False)
    kept = max(1, min(num_axes, int((singular > 1e-5 * singular[0]).sum()), len(embedding) // 4))
    deviations = np.maximum(singular[:kept] / np.sqrt(len(embedding) - 1), _FLOOR)
    statistics = features.statistics.astype(np.float64)
    covariance = np.cov(statistics, rowvar=False)
    values, vectors = np.linalg.eigh(covariance + np.diag(_RIDGE * np.diag(covariance) + _FLOOR))
    nothing = np.zeros((0, 0))
    projection = Projection(
        centre, axes[:kept].T, deviations, statistics.mean(axis=0), vectors / np.sqrt(values), nothing, nothing
    )
    projection = projection._replace(ordered=np.sort(_measures(features, projection), axis=0))
    scores = measure(features, projection)
    precision = np.zeros((scores.shape[1], scores.shape[1]))
    for name in TESTED_GROUPS:
        columns = measure_groups(projection)[name]
        # Shrunk, since there may be fewer images than measures.
        covariance, _ = ledoit_wolf(scores[:, columns])
        size = columns.stop - columns.start
        precision[columns, columns] = np.linalg.inv(covariance + _RIDGE * np.eye(size))
    return projection._replace(precision=precision)


def measure_names(projection: Projection) -> list[str]:
    """Names of the columns of `measure`."""
    axes = [f"embedding_{axis + 1}" for axis in range(projection.axes.shape[1])]
    return [*STATISTICS, "image_distance", *OUTPUTS, "embedding_distance", "embedding_residual", *axes]


def measure_groups(projection: Projection) -> dict[str, slice]:
    """Which columns of `measure` tell of the images' looks, of the outputs, and of the embedding and its axes."""
    image, output = len(STATISTICS) + 1, len(STATISTICS) + 1 + len(OUTPUTS)
    last = output + 2 + projection.axes.shape[1]
    return {
        "image": slice(0, image),
        "output": slice(image, output),
        "embedding": slice(output, last),
        "axes": slice(output + 2, last),
    }


def measure(features: Features, projection: Projection) -> NDArray[np.float64]:
    """Normal scores of N images against the reference: float64 (N, len(measure_names)), about -3 to 3."""
    raw = _measures(features, projection)
    count = len(projection.ordered)
    scores = np.empty_like(raw)
    for column in range(raw.shape[1]):
        ordered = projection.ordered[:, column]
        rank = (
            np.searchsorted(ordered, raw[:, column], "left") + np.searchsorted(ordered, raw[:, column], "right")
        ) / 2
        scores[:, column] = stats.norm.ppf((rank + 0.5) / (count + 1))
    return scores


def output_measures(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Confidence, entropy (nats) and energy (log-sum-exp of the logits) of N images: (N, 3)."""
    scores = logits.astype(np.float64)
    top = scores.max(axis=1, keepdims=True)
    energy = top[:, 0] + np.log(np.exp(scores - top).sum(axis=1))
    log_probabilities = scores - energy[:, None]
    probabilities = np.exp(log_probabilities)
    entropy = -(probabilities * log_probabilities).sum(axis=1)
    return np.stack([probabilities.max(axis=1), entropy, energy], axis=1)


def _measures(features: Features, projection: Projection) -> NDArray[np.float64]:
    centred = features.embedding - projection.centre
    along = centred @ projection.axes
    residual = np.maximum((centred**2).sum(axis=1) - (along**2).sum(axis=1), _FLOOR)
    along = along / projection.deviations
    whitened = (features.statistics - projection.image_centre) @ projection.image_whitening
    columns = [
        features.statistics,
        _squared_norm(whitened),
        output_measures(features.logits),
        _squared_norm(along),
        residual[:, None],
        along,
    ]
    return np.concatenate(columns, axis=1)


def _squared_norm(values: NDArray[np.float64]) -> NDArray[np.float64]:
    squares: NDArray[np.float64] = (values**2).sum(axis=1, keepdims=True)
    return squares
