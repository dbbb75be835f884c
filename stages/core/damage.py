"""How many of a window's predictions are right, estimated without labels.

The model is asked a second time, with its batch norms adapted to the window. Under drift the adapted model keeps most
of its accuracy, so that the probability that it gives to the first prediction tells how likely that one is right:
learned on simulated corruptions, by logistic regression. The field's baselines stand beside it: average confidence,
difference of confidences (Guillory et al. 2021) and average thresholded confidence (Garg et al. 2022).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special
from sklearn.linear_model import LogisticRegression

from stages.core.params import Section

Logits = NDArray[np.float32]
Values = NDArray[np.float64]
_FLOOR = 1e-3
_NUM_REDRAWN, _EM_ROUNDS = 100, 200


class Baselines(Section):
    """What the baselines remember of clean, labelled images."""

    accuracy: float
    temperature: float  # that calibrates the confidences (Guo et al. 2017)
    confidence: float  # mean, calibrated
    threshold: float  # of the negative entropy, that as many clean images exceed as are right


class DamageModel(Section):
    """Logistic regression from what two predictions of an image say to the probability that the first is right."""

    mean: list[float]
    scale: list[float]
    weights: list[float]
    bias: float


def fit_baselines(logits: Logits, labels: NDArray[np.int64]) -> Baselines:
    """Fit to clean images (N, num_classes) with labels (N,)."""
    rows = np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        scores = special.log_softmax(logits.astype(np.float64) / np.exp(log_temperature), axis=1)
        return float(-scores[rows, labels].mean())

    temperature = float(np.exp(optimize.minimize_scalar(loss, bounds=(-3.0, 3.0), method="bounded").x))
    accuracy = float((logits.argmax(axis=1) == labels).mean())
    confidences, certainties = _confidences(logits, temperature)
    return Baselines(
        accuracy=accuracy,
        temperature=temperature,
        confidence=float(confidences.mean()),
        threshold=float(np.quantile(certainties, 1 - accuracy)),
    )


class Confusion(Section):
    """How the images of a class are predicted, which stays as it is when only the mix of classes changes."""

    shares: list[list[float]]  # (num_classes, num_classes): P(predicted | true), a row for each true class
    counts: list[int]  # (num_classes,) clean images of each class that this is known from


def fit_confusion(logits: Logits, labels: NDArray[np.int64]) -> Confusion:
    """Of clean images (N, num_classes) with labels (N,); each row drawn to the mean as one more image would do."""
    num_classes = logits.shape[1]
    predicted = logits.argmax(axis=1)
    table: Values = np.zeros((num_classes, num_classes))
    np.add.at(table, (labels, predicted), 1)
    counts = table.sum(axis=1)
    right = float(((predicted == labels).sum() + 1) / (len(labels) + 2))  # below 1, so that nothing is impossible
    one_more: Values = np.full_like(table, (1 - right) / max(1, num_classes - 1))
    np.fill_diagonal(one_more, right)
    table += one_more
    return Confusion(shares=(table / table.sum(axis=1, keepdims=True)).tolist(), counts=counts.astype(int).tolist())


def shifted_accuracy(confusion: Confusion, predicted: NDArray[np.int64]) -> tuple[float, float]:
    """Accuracy, and its standard error, on images predicted as classes (n,) that differ by their mix of classes only.

    The error comes from windows drawn anew, and from how many images of each class the confusion is known from.
    """
    shares, known = np.array(confusion.shares), np.array(confusion.counts)
    right = np.diagonal(shares)
    seen = np.bincount(predicted, minlength=len(shares)) / len(predicted)
    again = np.random.default_rng(len(predicted)).multinomial(len(predicted), seen, _NUM_REDRAWN) / len(predicted)
    mixes = _likeliest_mixes(shares, np.concatenate([seen[None], again]))
    accuracies = mixes @ right
    error = (mixes[0] ** 2 * right * (1 - right) / (known + 1)).sum()
    return float(accuracies[0]), float(np.sqrt(accuracies[1:].var() + error))


def true_classes(confusion: Confusion, predicted: NDArray[np.int64]) -> Values:
    """P(true | predicted) of images predicted as classes (n,) that differ by their mix of classes only.

    Shape (num_classes, num_classes), a column for each predicted class; columns of classes that are in `predicted` sum
    up to 1.
    """
    shares = np.array(confusion.shares)
    seen = np.bincount(predicted, minlength=len(shares)) / len(predicted)
    joint = _likeliest_mixes(shares, seen[None])[0][:, None] * shares
    columns: Values = joint / np.maximum(joint.sum(axis=0), 1e-300)
    return columns


def _likeliest_mixes(shares: Values, seen: Values) -> Values:
    """Mixes of true classes (B, num_classes) that make shares of predicted ones (B, num_classes) the likeliest.

    By expectation-maximisation (Saerens et al. 2002).
    """
    mixes: Values = np.full_like(seen, 1 / len(shares))
    for _ in range(_EM_ROUNDS):
        mixes = mixes * ((seen / (mixes @ shares)) @ shares.T)
    return mixes


def baseline_estimates(logits: Logits, baselines: Baselines) -> dict[str, float]:
    """Estimated accuracy of a window (N, num_classes) by each baseline."""
    confidences, certainties = _confidences(logits, baselines.temperature)
    confidence = float(confidences.mean())
    return {
        "average_confidence": confidence,
        "difference_of_confidences": baselines.accuracy + confidence - baselines.confidence,
        "average_thresholded_confidence": float((certainties > baselines.threshold).mean()),
    }


def damage_inputs(logits: Logits, adapted: Logits | None) -> Values:
    """What the model is fitted to, by image: (N, 6) of both predictions, or (N, 3) of the first one alone."""
    first = special.softmax(logits.astype(np.float64), axis=1)
    if adapted is None:
        ordered = np.sort(first, axis=1)
        energy = special.logsumexp(logits.astype(np.float64), axis=1)
        return np.stack([np.log(1 - ordered[:, -1] + _FLOOR), ordered[:, -1] - ordered[:, -2], energy], axis=1)
    second = special.softmax(adapted.astype(np.float64), axis=1)
    predicted, again = first.argmax(axis=1), second.argmax(axis=1)
    supported = second[np.arange(len(second)), predicted]
    divergence = _entropy((first + second) / 2) - (_entropy(first) + _entropy(second)) / 2  # Jensen-Shannon
    columns = [
        (predicted == again).astype(np.float64),
        supported,
        np.log(supported + _FLOOR),
        divergence,
        second.max(axis=1),
        _entropy(second),
    ]
    return np.stack(columns, axis=1)


def fit_damage(inputs: Values, right: NDArray[np.bool_]) -> DamageModel:
    """Fit to images (N, k) of which it is known whether the first prediction is right (N,)."""
    mean, scale = inputs.mean(axis=0), np.maximum(inputs.std(axis=0), 1e-6)
    if right.all() or not right.any():  # nothing to tell apart
        share = np.clip(right.mean(), 1 / (len(right) + 2), 1 - 1 / (len(right) + 2))
        weights, bias = np.zeros(inputs.shape[1]), float(special.logit(share))
    else:
        fitted = LogisticRegression(C=1.0, max_iter=2000).fit((inputs - mean) / scale, right)
        weights, bias = fitted.coef_[0], float(fitted.intercept_[0])
    return DamageModel(mean=mean.tolist(), scale=scale.tolist(), weights=weights.tolist(), bias=bias)


def probability_right(model: DamageModel, inputs: Values) -> Values:
    """Probability (N,) that the first prediction is right."""
    standard = (inputs - np.array(model.mean)) / np.array(model.scale)
    probabilities: Values = special.expit(standard @ np.array(model.weights) + model.bias)
    return probabilities


def _confidences(logits: Logits, temperature: float) -> tuple[Values, Values]:
    """Calibrated confidence and negative entropy of each image."""
    probabilities = special.softmax(logits.astype(np.float64) / temperature, axis=1)
    return probabilities.max(axis=1), -_entropy(probabilities)


def _entropy(probabilities: Values) -> Values:
    entropy: Values = special.entr(probabilities).sum(axis=1)
    return entropy
