"""The numbers and tables that the drift stage reports, out of what was measured by condition."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from stages.core.corruptions import STANDARD_KINDS
from stages.core.detector import DetectorSpec, verdict
from stages.core.drift_check import AlarmRates, Measured

Row = dict[str, Any]
OUR_ESTIMATE = "adapted"


def summary(
    spec: DetectorSpec, clean_accuracy: float, alarms: dict[int, AlarmRates], measured: Sequence[Measured]
) -> dict[str, Any]:
    """metrics/drift.json: rates over the 15 standard kinds and 5 severities; accuracies and errors as shares."""
    standard = [one for one in measured if one.kind in STANDARD_KINDS]
    harmful = [one for one in standard if clean_accuracy - one.accuracy > spec.max_drop]
    shares = sorted({share for one in standard for share in one.contaminated})
    return {
        "alpha": spec.alpha,
        "max_drop": spec.max_drop,
        "clean_accuracy": clean_accuracy,
        "num_conditions": len(standard),
        "num_harmful": len(harmful),
        "false_alarms": {
            str(size): {"mean": rates.mean, "worst": rates.worst, "resplits": len(rates.rates)}
            for size, rates in alarms.items()
        },
        "detection": _detection(standard, alarms),
        "detection_of_harmful": _detection(harmful, alarms),
        "detection_of_contaminated": {
            f"{share:.2f}": _mean([one.contaminated[share] for one in standard if share in one.contaminated])
            for share in shares
        },
        "public_methods": {
            name: {
                str(size): _mean([one.baselines[name][size] for one in standard if size in one.baselines[name]])
                for size in standard[0].baselines[name]
            }
            for name in standard[0].baselines
        },
        "estimate_error": _estimate_errors(standard),
        "interval_coverage": _coverage(standard),
        "decisions": _decisions(standard, clean_accuracy, spec.max_drop, spec.baselines.accuracy),
    }


def lines(report: dict[str, Any]) -> list[str]:
    """What the stage says at its end."""
    size = max(report["detection"], key=int)
    alarms = report["false_alarms"][size]
    said = [f"{report['num_conditions']} conditions, windows of {size}: {report['detection'][size]:.3f} detected"]
    if report["num_harmful"]:
        said.append(f"{report['detection_of_harmful'][size]:.3f} of the harmful")
    said.append(f"false alarms {alarms['mean']:.4f} (worst of {alarms['resplits']} splits {alarms['worst']:.4f})")
    error = report["estimate_error"].get(OUR_ESTIMATE, {})
    if error:
        size = max(error, key=int)
        decisions = report["decisions"][size]
        said.append(f"accuracy estimated to {100 * error[size]:.1f} points, harmful or benign F1 {decisions['f1']:.3f}")
    return said


def severity_rows(measured: Sequence[Measured]) -> list[Row]:
    """One row a kind and severity: true accuracy, mean estimate, and detection by window size."""
    rows = []
    for one in measured:
        largest = max((estimate.window for estimate in one.estimates), default=0)
        estimates = [each.estimates[OUR_ESTIMATE] for each in one.estimates if each.window == largest]
        rows.append(
            {
                "kind": one.kind,
                "severity": one.severity,
                "accuracy": one.accuracy,
                "estimated": float(np.mean(estimates)) if estimates else float("nan"),
            }
            | {f"detected_{size}": rate for size, rate in one.detected.items()}
        )
    return rows


def power_rows(measured: Sequence[Measured], alarms: dict[int, AlarmRates]) -> list[Row]:
    """One row a method, severity and window size: share of windows with an alarm, mean over the standard kinds."""
    standard = [one for one in measured if one.kind in STANDARD_KINDS]
    rows: list[Row] = []
    for size in alarms:
        for severity in sorted({one.severity for one in standard}):
            some = [one for one in standard if one.severity == severity and size in one.detected]
            if some:
                row = {"window": size, "severity": severity, "detected": _mean([one.detected[size] for one in some])}
                rows.append(
                    row | {name: _mean([one.baselines[name][size] for one in some]) for name in some[0].baselines}
                )
    return rows


def estimate_rows(measured: Sequence[Measured]) -> list[Row]:
    """One row a window: true accuracy, the estimates, and ours with its interval."""
    return [
        {"kind": each.kind, "severity": each.severity, "window": each.window, "true": each.true}
        | {"estimated": each.estimates[OUR_ESTIMATE], "low": each.low, "high": each.high}
        | {name: value for name, value in each.estimates.items() if name != OUR_ESTIMATE}
        for one in measured
        for each in one.estimates
    ]


def _estimate_errors(standard: Sequence[Measured]) -> dict[str, dict[str, float]]:
    """Mean absolute error against the window's true accuracy, by method and window size."""
    errors: dict[str, dict[int, list[float]]] = {}
    for one in standard:
        for each in one.estimates:
            for name, value in each.estimates.items():
                errors.setdefault(name, {}).setdefault(each.window, []).append(abs(value - each.true))
    return {name: {str(size): _mean(values) for size, values in sized.items()} for name, sized in errors.items()}


def _coverage(standard: Sequence[Measured]) -> dict[str, float]:
    """Share of windows whose true accuracy lies in the 95 % interval, by window size."""
    inside: dict[int, list[bool]] = {}
    for one in standard:
        for each in one.estimates:
            inside.setdefault(each.window, []).append(each.low <= each.true <= each.high)
    return {str(size): _mean(values) for size, values in inside.items()}


def _decisions(
    standard: Sequence[Measured], clean_accuracy: float, max_drop: float, known_accuracy: float
) -> dict[str, dict[str, float]]:
    """Harmful against benign, by window size: F1, precision and recall by the accuracy of the window itself.

    f1_of_condition goes by the accuracy of all images under the condition, of which the window is a sample.
    """
    result: dict[str, dict[str, float]] = {}
    for size in sorted({each.window for one in standard for each in one.estimates}):
        windows = [(one, each) for one in standard for each in one.estimates if each.window == size]
        said = [
            verdict(True, known_accuracy - each.estimates[OUR_ESTIMATE], max_drop) == "harmful" for _, each in windows
        ]
        own = _scores([known_accuracy - each.true > max_drop for _, each in windows], said)
        condition = _scores([clean_accuracy - one.accuracy > max_drop for one, _ in windows], said)
        result[str(size)] = own | {"f1_of_condition": condition["f1"]}
    return result


def _scores(truth: Sequence[bool], said: Sequence[bool]) -> dict[str, float]:
    hits = sum(each and other for each, other in zip(truth, said, strict=True))
    return {
        "f1": 2 * hits / (sum(truth) + sum(said)) if sum(truth) + sum(said) else 1.0,
        "precision": hits / sum(said) if sum(said) else 1.0,
        "recall": hits / sum(truth) if sum(truth) else 1.0,
    }


def _detection(measured: Sequence[Measured], sizes: Iterable[int]) -> dict[str, float]:
    rates = {size: [one.detected[size] for one in measured if size in one.detected] for size in sizes}
    return {str(size): _mean(some) for size, some in rates.items() if some}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
