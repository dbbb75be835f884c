"""Numbers and tables that say how good a classifier's probabilities are."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve, precision_recall_fscore_support

Probabilities = NDArray[np.float64]  # (N, num_classes), rows sum to 1
Labels = NDArray[np.int64]  # (N,)


def summary(probabilities: Probabilities, labels: Labels, num_bins: int) -> dict[str, float]:
    """top1 and macro_f1 (shares), nll (nats), ece (share), each in [0, 1] but nll."""
    predicted = probabilities.argmax(axis=1)
    likelihood = probabilities[np.arange(len(labels)), labels]
    return {
        "top1": float((predicted == labels).mean()),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0.0)),
        "nll": float(-np.log(np.maximum(likelihood, 1e-12)).mean()),
        "ece": expected_calibration_error(probabilities, labels, num_bins),
    }


def expected_calibration_error(probabilities: Probabilities, labels: Labels, num_bins: int) -> float:
    """Mean gap between confidence and accuracy over equal-width bins, weighted by their images (Guo et al. 2017)."""
    rows = reliability(probabilities, labels, num_bins)
    return float(sum(row["num_images"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / len(labels))


def reliability(probabilities: Probabilities, labels: Labels, num_bins: int) -> list[dict[str, Any]]:
    """One row for each non-empty confidence bin (low, high]: mean confidence, accuracy, number of images."""
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    edges = np.linspace(0, 1, num_bins + 1)
    bins = np.clip(np.digitize(confidence, edges, right=True) - 1, 0, num_bins - 1)
    return [
        {
            "bin": f"{edges[i]:.2f}-{edges[i + 1]:.2f}",
            "confidence": float(confidence[bins == i].mean()),
            "accuracy": float(correct[bins == i].mean()),
            "num_images": int((bins == i).sum()),
        }
        for i in range(num_bins)
        if (bins == i).any()
    ]


def per_class(probabilities: Probabilities, labels: Labels, classes: list[str]) -> list[dict[str, Any]]:
    """One row a class: precision, recall, f1, average precision, number of images."""
    indices = list(range(len(classes)))
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, probabilities.argmax(axis=1), labels=indices, zero_division=0.0
    )
    return [
        {
            "class": classes[i],
            "precision": float(precision[i]),
            "recall": float(recall[i]),
            "f1": float(f1[i]),
            "average_precision": float(average_precision_score(labels == i, probabilities[:, i])),
            "num_images": int(support[i]),
        }
        for i in indices
    ]


def precision_recall(probabilities: Probabilities, labels: Labels, num_points: int = 51) -> list[dict[str, Any]]:
    """Interpolated precision at evenly spaced recalls, one class against the rest: the mean and the worst class.

    Precision at a recall is the best that any threshold of at least that recall gives, as in PASCAL VOC.
    """
    grid = np.linspace(0, 1, num_points)
    curves = []
    for i in range(probabilities.shape[1]):
        precision, recall, _ = precision_recall_curve(labels == i, probabilities[:, i])
        precision, recall = precision[:-1], recall[:-1]  # without the point (recall 0, precision 1) that sklearn adds
        best = np.maximum.accumulate(precision)  # recall falls along the curve, so this is the best at or above it
        curves.append(best[np.searchsorted(-recall, -grid, side="right") - 1])
    mean, worst = np.mean(curves, axis=0), np.min(curves, axis=0)
    return [
        {"recall": round(float(r), 4), "mean_precision": float(m), "worst_class_precision": float(w)}
        for r, m, w in zip(grid, mean, worst, strict=True)
    ]
