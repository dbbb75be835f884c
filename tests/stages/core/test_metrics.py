from __future__ import annotations

import math

import numpy as np
import pytest

from stages.core import metrics

# Four images of three classes, by hand: three right, one wrong.
PROBABILITIES = np.array([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.1, 0.85, 0.05], [0.2, 0.2, 0.6]])
LABELS = np.array([0, 1, 1, 2])


def test_summary_by_hand() -> None:
    found = metrics.summary(PROBABILITIES, LABELS, num_bins=10)
    assert found["top1"] == 0.75
    assert found["nll"] == pytest.approx(-(math.log(0.8) + math.log(0.3) + math.log(0.85) + math.log(0.6)) / 4)
    # f1 of class 0: precision 1/2, recall 1; of 1: precision 1, recall 1/2; of 2: 1
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    # bins: (0.5, 0.6] holds 0.6 wrong and 0.6 right; (0.7, 0.8] 0.8 right; (0.8, 0.9] 0.85 right
    assert found["ece"] == pytest.approx((2 * abs(0.5 - 0.6) + abs(1 - 0.8) + abs(1 - 0.85)) / 4)


def test_confidence_at_a_bins_upper_edge_belongs_to_it() -> None:
    rows = metrics.reliability(np.array([[0.5, 0.5], [1.0, 0.0]]), np.array([0, 0]), 2)
    assert [(row["bin"], row["num_images"]) for row in rows] == [("0.00-0.50", 1), ("0.50-1.00", 1)]


def test_calibrated_probabilities_have_a_small_error_and_overconfident_ones_a_large() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 50_000)
    labels = (rng.random(50_000) > confidence).astype(np.int64)
    calibrated = np.stack([confidence, 1 - confidence], axis=1)
    assert metrics.expected_calibration_error(calibrated, labels, 15) < 0.01
    certain = np.stack([np.full(50_000, 0.999), np.full(50_000, 0.001)], axis=1)
    assert metrics.expected_calibration_error(certain, labels, 15) == pytest.approx(0.999 - 0.75, abs=0.01)


def test_per_class_by_hand() -> None:
    rows = metrics.per_class(PROBABILITIES, LABELS, ["a", "b", "c"])
    assert [row["precision"] for row in rows] == [0.5, 1.0, 1.0]
    assert [row["recall"] for row in rows] == [1.0, 0.5, 1.0]
    assert [row["num_images"] for row in rows] == [1, 2, 1]
    assert rows[2]["average_precision"] == 1.0


def test_a_class_that_is_never_predicted_counts_as_zero() -> None:
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2]])
    assert metrics.summary(probabilities, np.array([0, 1]), 5)["macro_f1"] == pytest.approx(1 / 3)


def test_precision_recall_by_hand() -> None:
    # class 0 against the rest: scores .9 (hit), .8 (miss), .7 (hit) -> best precision 1 up to recall .5, then 2/3
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    rows = metrics.precision_recall(probabilities, np.array([0, 1, 0]), num_points=5)
    assert [row["recall"] for row in rows] == [0, 0.25, 0.5, 0.75, 1]
    # class 1: its one hit ranks second of three -> precision 1/2 at every recall
    expected = [(1 + 0.5) / 2, (1 + 0.5) / 2, (1 + 0.5) / 2, (2 / 3 + 0.5) / 2, (2 / 3 + 0.5) / 2]
    assert [row["mean_precision"] for row in rows] == pytest.approx(expected)
    assert all(row["worst_class_precision"] == pytest.approx(0.5) for row in rows)


def test_a_perfect_classifier() -> None:
    labels = np.arange(30) % 3
    found = metrics.summary(np.eye(3)[labels], labels, 15)
    assert found == {"top1": 1.0, "macro_f1": 1.0, "nll": 0.0, "ece": 0.0}
