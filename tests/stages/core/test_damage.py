"""The damage estimate and its baselines, on logits by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import special
from scipy.spatial.distance import jensenshannon

from stages.core.damage import (
    Baselines,
    DamageModel,
    baseline_estimates,
    damage_inputs,
    fit_baselines,
    fit_confusion,
    fit_damage,
    probability_right,
    shifted_accuracy,
)


def calibrated(count: int, num_classes: int = 5) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits whose softmax is the probability of each label, and labels that are drawn so."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (count, num_classes))
    cumulative = special.softmax(logits, axis=1).cumsum(axis=1)
    labels = (rng.random((count, 1)) > cumulative).sum(axis=1).clip(max=num_classes - 1)
    return logits.astype(np.float32), labels.astype(np.int64)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_is_found(temperature: float) -> None:
    logits, labels = calibrated(20_000)
    found = fit_baselines((logits * temperature).astype(np.float32), labels)
    assert found.temperature == pytest.approx(temperature, rel=0.04)
    assert found.accuracy == (logits.argmax(axis=1) == labels).mean()
    assert found.confidence == pytest.approx(found.accuracy, abs=0.01)


def test_baselines_by_hand() -> None:
    """Two classes, log odds 0, 2 and 4."""
    logits = np.array([[0, 0], [2, 0], [0, 4]], dtype=np.float32)
    confidence = float(special.expit([0, 2, 4]).mean())
    entropy_of_2 = float(special.entr(special.expit([2.0, -2.0])).sum())
    known = Baselines(accuracy=0.9, temperature=1.0, confidence=0.95, threshold=-entropy_of_2 - 0.01)
    found = baseline_estimates(logits, known)
    assert found["average_confidence"] == pytest.approx(confidence)
    assert found["difference_of_confidences"] == pytest.approx(0.9 + confidence - 0.95)
    assert found["average_thresholded_confidence"] == pytest.approx(2 / 3)
    cooler = baseline_estimates(2 * logits, known.model_copy(update={"temperature": 2.0}))
    assert cooler == pytest.approx(found)


def test_baselines_are_exact_on_what_they_are_fitted_to() -> None:
    logits, labels = calibrated(4000)
    known = fit_baselines(logits, labels)
    found = baseline_estimates(logits, known)
    assert found["average_confidence"] == pytest.approx(known.confidence)
    assert found["difference_of_confidences"] == pytest.approx(known.accuracy)
    assert found["average_thresholded_confidence"] == pytest.approx(known.accuracy, abs=1 / 4000)


def test_baselines_of_a_classifier_that_is_always_right_or_always_wrong() -> None:
    logits = (8 * np.eye(4, dtype=np.float32))[np.arange(40) % 4]
    for labels, accuracy in ((np.arange(40) % 4, 1.0), ((np.arange(40) + 1) % 4, 0.0)):
        known = fit_baselines(logits, labels)
        assert known.accuracy == accuracy
        assert all(np.isfinite(value) for value in known.model_dump().values())
        json.dumps(known.model_dump(), allow_nan=False)


def test_inputs_of_two_predictions_by_hand() -> None:
    first = np.array([[2, 0, 0], [0, 1, 0]], dtype=np.float32)
    second = np.array([[1, 0, 0], [3, 0, 0]], dtype=np.float32)
    found = damage_inputs(first, second)
    assert found.shape == (2, 6)
    p, q = special.softmax(first.astype(np.float64), axis=1), special.softmax(second.astype(np.float64), axis=1)
    supported = np.array([q[0, 0], q[1, 1]])
    expected = [
        [1, 0],
        supported,
        np.log(supported + 1e-3),
        [jensenshannon(p[row], q[row]) ** 2 for row in range(2)],
        q.max(axis=1),
        special.entr(q).sum(axis=1),
    ]
    np.testing.assert_allclose(found, np.transpose(expected), rtol=1e-6)


def test_inputs_of_one_prediction_by_hand() -> None:
    logits = np.array([[2, 1, 0], [-1, 5, 4]], dtype=np.float32)
    probabilities = np.sort(special.softmax(logits.astype(np.float64), axis=1), axis=1)
    found = damage_inputs(logits, None)
    assert found.shape == (2, 3)
    np.testing.assert_allclose(found[:, 0], np.log(1 - probabilities[:, 2] + 1e-3))
    np.testing.assert_allclose(found[:, 1], probabilities[:, 2] - probabilities[:, 1])
    np.testing.assert_allclose(found[:, 2], np.log(np.exp(logits.astype(np.float64)).sum(axis=1)))


def test_inputs_stay_finite() -> None:
    wild = np.array([[1000, -1000, 0], [0, 0, 0]], dtype=np.float32)
    for adapted in (None, wild[::-1].copy(), wild):
        assert np.isfinite(damage_inputs(wild, adapted)).all()


def test_what_can_be_told_apart_is() -> None:
    rng = np.random.default_rng(0)
    right = rng.random(400) < 0.6
    inputs = np.stack([np.where(right, 3.0, -3.0) + rng.normal(0, 0.3, 400), rng.normal(size=400)], axis=1)
    found = probability_right(fit_damage(inputs, right), inputs)
    assert found[right].min() > 0.9
    assert found[~right].max() < 0.1


def test_what_cannot_gets_the_share() -> None:
    rng = np.random.default_rng(0)
    right, inputs = rng.random(5000) < 0.7, rng.normal(size=(5000, 3))
    inputs[:, 2] = 4.0  # tells nothing at all
    found = probability_right(fit_damage(inputs, right), inputs)
    assert found.mean() == pytest.approx(right.mean(), abs=1e-3)
    assert found.std() < 0.03


def test_the_probability_is_that_of_the_logistic_model() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(2, 3, (20_000, 2))
    truth = special.expit(inputs @ [0.5, -0.3] + 0.4)
    right = rng.random(20_000) < truth
    np.testing.assert_allclose(probability_right(fit_damage(inputs, right), inputs), truth, atol=0.03)


@pytest.mark.parametrize("answer", [True, False])
def test_all_right_or_all_wrong_stays_inside_the_unit_interval(answer: bool) -> None:
    inputs = np.random.default_rng(0).normal(size=(18, 3))
    model = fit_damage(inputs, np.full(18, answer))
    found = probability_right(model, inputs * 100)
    assert found == pytest.approx(19 / 20 if answer else 1 / 20)
    json.dumps(model.model_dump(), allow_nan=False)


def test_probabilities_of_wild_inputs_are_probabilities() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(100, 3))
    model = fit_damage(inputs, inputs[:, 0] > 0)
    found = probability_right(model, 1e6 * rng.normal(size=(50, 3)))
    assert ((found >= 0) & (found <= 1)).all()
    assert DamageModel.model_validate_json(model.model_dump_json()) == model


def predictions(labels: NDArray[np.int64], recalls: list[float], rng: np.random.Generator) -> NDArray[np.float32]:
    """One-hot logits: of each class so many are right, and the others are taken for the next class."""
    wrong = rng.random(len(labels)) > np.array(recalls)[labels]
    predicted = (labels + wrong) % len(recalls)
    return np.eye(len(recalls), dtype=np.float32)[predicted]


def test_the_confusion_is_by_true_class() -> None:
    labels = np.arange(3000) % 3
    found = fit_confusion(predictions(labels, [0.7, 0.9, 1.0], np.random.default_rng(0)), labels)
    assert found.counts == [1000, 1000, 1000]
    shares = np.array(found.shares)
    assert np.abs(shares - np.array([[0.7, 0.3, 0], [0, 0.9, 0.1], [0, 0, 1]])).max() < 0.04
    assert shares.min() > 0
    assert shares.sum(axis=1) == pytest.approx(1)


@pytest.mark.parametrize("mix", [[1, 0, 0], [0, 1, 0], [0.5, 0.5, 0], [0.2, 0.2, 0.6]])
def test_the_accuracy_under_another_mix_is_that_of_its_classes(mix: list[float]) -> None:
    """Not that of the predicted classes: of those called 1, most are right on the clean mix, and none on class 0."""
    recalls = [0.7, 0.9, 0.99]
    rng = np.random.default_rng(1)
    labels = np.arange(600) % 3
    confusion = fit_confusion(predictions(labels, recalls, rng), labels)
    inside = 0
    for _ in range(200):
        window = rng.choice(3, 200, p=mix)
        logits = predictions(window, recalls, rng)
        predicted = logits.argmax(axis=1).astype(np.int64)
        accuracy, error = shifted_accuracy(confusion, predicted)
        truth = float((predicted == window).mean())
        assert accuracy == pytest.approx(truth, abs=0.17)
        counting = accuracy * (1 - accuracy) / len(window)
        inside += abs(accuracy - truth) <= 1.96 * (error**2 + counting) ** 0.5
    assert inside >= 180, "of 200 intervals of 95 %; the confusion, which is off by chance, is the same for all"


def test_one_class_that_is_always_right() -> None:
    confusion = fit_confusion(np.ones((5, 1), dtype=np.float32), np.zeros(5, dtype=np.int64))
    accuracy, error = shifted_accuracy(confusion, np.zeros(4, dtype=np.int64))
    assert (accuracy, error) == (1.0, 0.0)
