"""Features by formula, for the drift tests: classes as clusters, looks as independent normal numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.core.damage import Confusion, fit_baselines, fit_damage
from stages.core.detector import Detector, DetectorSpec, SizedDamage, build
from stages.core.features import Features
from stages.core.image_statistics import STATISTICS
from stages.core.measures import fit_projection
from stages.core.two_sample import Population, population_of

NUM_CLASSES = 4
DIM = 12
CENTRES = 2.5 * np.random.default_rng(99).normal(size=(NUM_CLASSES, DIM))


def classes_of(count: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, 1]).integers(0, NUM_CLASSES, count)


def features(
    count: int, seed: int, looks: float = 0.0, inside: float = 0.0, classes: NDArray[np.int64] | None = None
) -> Features:
    """Images whose looks and embedding are shifted by so many standard deviations, the latter along every axis."""
    rng = np.random.default_rng([seed, 2])
    classes = classes_of(count, seed) if classes is None else classes
    embedding = CENTRES[classes] + rng.normal(size=(count, DIM)) + inside
    logits = -0.25 * ((embedding[:, None] - CENTRES) ** 2).sum(axis=2)
    statistics = rng.normal(size=(count, len(STATISTICS))) + looks
    return Features(*(values.astype(np.float32) for values in (logits, embedding, statistics)))


def population(some: Features, fitted_to: Features, num_axes: int = 4) -> Population:
    projection = fit_projection(fitted_to, num_axes)
    return population_of(some, projection)


def detector(num_threshold: int = 400, accuracy: float = 0.5, **changes: Any) -> Detector:
    """A detector that takes every prediction to be right with probability `accuracy`; known accuracy about 1."""
    reference, threshold = features(200, 1), features(num_threshold, 2)
    right = np.arange(1000) < 1000 * accuracy
    sizes = [SizedDamage(window=size, model=fit_damage(np.zeros((1000, 3)), right), error=0.02) for size in (10, 50)]
    spec: dict[str, Any] = {
        "class_ids": [str(label) for label in range(NUM_CLASSES)],
        "image_size": 32,
        "crop_mode": "center",
        "interpolation": "bilinear",
        "precision": "fp32",
        "alpha": 0.01,
        "max_drop": 0.1,
        "null_windows": 399,
        "seed": 0,
        "baselines": fit_baselines(threshold.logits, classes_of(num_threshold, 2)),
        "classifier_sha256": None,
        "confusion": Confusion(shares=np.eye(NUM_CLASSES).clip(1e-9).tolist(), counts=[1000] * NUM_CLASSES),
        "damage": sizes,
        "adapts": False,
    }
    projection = fit_projection(reference, 4)
    return build(
        DetectorSpec(**(spec | changes)),
        projection,
        population_of(threshold, projection),
        classes_of(num_threshold, 2),
    )


def clouds(count: int, height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth pictures (count, height, width, 3) in colour."""
    rng = np.random.default_rng(seed)
    pictures = [
        Image.fromarray(rng.integers(40, 216, (5, 5, 3), dtype=np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        for _ in range(count)
    ]
    return np.stack([np.asarray(picture) for picture in pictures])
