"""The drift stage's numbers, against ones that were counted by hand."""

from __future__ import annotations

import math

import pytest

from stages.core import drift_summary
from stages.core.damage import Baselines
from stages.core.detector import DetectorSpec
from stages.core.drift_check import AlarmRates, Estimate, Measured

CLEAN, KNOWN, MAX_DROP = 0.90, 0.92, 0.05  # KNOWN is counted on other images than CLEAN
SPEC = DetectorSpec.model_construct(
    alpha=0.01,
    max_drop=MAX_DROP,
    baselines=Baselines.model_construct(accuracy=KNOWN),
)
ALARMS = {10: AlarmRates(0.01, 0.02, [0.0, 0.02]), 50: AlarmRates(0.015, 0.02, [0.01, 0.02])}


def estimate(kind: str, severity: int, window: int, true: float, estimated: float) -> Estimate:
    methods = {"adapted": estimated, "average_confidence": estimated + 0.1}
    return Estimate(kind, severity, window, true, methods, estimated - 0.05, estimated + 0.05)


def measured(kind: str, severity: int, accuracy: float, rate: float, estimates: list[Estimate]) -> Measured:
    baselines = {"bbsds_ks": {10: rate / 2, 50: rate / 4}, "embedding_mmd": {10: 0.0, 50: rate}}
    return Measured(kind, severity, accuracy, {10: rate, 50: 1.0}, {0.1: rate, 0.5: 1.0}, baselines, estimates)


FOG = measured(
    "fog", 1, 0.88, 0.2, [estimate("fog", 1, 10, 0.9, 0.7), estimate("fog", 1, 50, 0.88, 0.86)]
)  # harmless; called harmful by the window of 50
SNOW = measured(
    "snow", 3, 0.60, 0.8, [estimate("snow", 3, 10, 0.6, 0.61), estimate("snow", 3, 50, 0.6, 0.56)]
)  # harmful, and called so
BLUR = measured(
    "gaussian_blur", 5, 0.10, 0.0, [estimate("gaussian_blur", 5, 50, 0.1, 0.9)]
)  # none of the fifteen standard kinds
ALL = [FOG, SNOW, BLUR]


def test_rates_are_means_over_the_standard_kinds() -> None:
    found = drift_summary.summary(SPEC, CLEAN, ALARMS, ALL)
    assert (found["num_conditions"], found["num_harmful"]) == (2, 1)
    assert found["detection"] == {"10": pytest.approx(0.5), "50": 1.0}
    assert found["detection_of_harmful"] == {"10": pytest.approx(0.8), "50": 1.0}
    assert found["detection_of_contaminated"] == {"0.10": pytest.approx(0.5), "0.50": 1.0}
    assert found["public_methods"] == {
        "bbsds_ks": {"10": pytest.approx(0.25), "50": pytest.approx(0.125)},
        "embedding_mmd": {"10": 0.0, "50": pytest.approx(0.5)},
    }
    assert found["false_alarms"]["10"] == {"mean": 0.01, "worst": 0.02, "resplits": 2}


def test_errors_and_coverage_are_by_window_size() -> None:
    found = drift_summary.summary(SPEC, CLEAN, ALARMS, ALL)
    assert found["estimate_error"]["adapted"] == {"10": pytest.approx(0.105), "50": pytest.approx(0.03)}
    assert found["estimate_error"]["average_confidence"] == {"10": pytest.approx(0.105), "50": pytest.approx(0.07)}
    assert found["interval_coverage"] == {"10": 0.5, "50": 1.0}


def test_decisions_are_judged_by_the_window_and_by_its_condition() -> None:
    """Of the windows of 50, both are called harmful: their estimates are more than 0.05 below 0.92."""
    found = drift_summary.summary(SPEC, CLEAN, ALARMS, ALL)["decisions"]["50"]
    assert found == {
        "f1": pytest.approx(2 / 3),
        "precision": 0.5,
        "recall": 1.0,
        "f1_of_condition": pytest.approx(2 / 3),
    }
    # a window of a harmless condition that lost much itself
    unlucky = FOG._replace(estimates=[estimate("fog", 1, 50, 0.80, 0.81)])
    found = drift_summary.summary(SPEC, CLEAN, ALARMS, [unlucky, SNOW])["decisions"]["50"]
    assert (found["f1"], found["f1_of_condition"]) == (1.0, pytest.approx(2 / 3))


def test_without_harm_nothing_is_claimed_of_it() -> None:
    harmless = FOG._replace(estimates=[estimate("fog", 1, 50, 0.9, 0.9)])
    found = drift_summary.summary(SPEC, CLEAN, ALARMS, [harmless])
    assert found["num_harmful"] == 0
    assert found["detection_of_harmful"] == {}
    assert found["decisions"]["50"]["f1"] == 1.0
    assert not any("harmful," in line or "of the harmful" in line for line in drift_summary.lines(found))


def test_tables_have_a_row_each() -> None:
    rows = drift_summary.severity_rows(ALL)
    assert [(row["kind"], row["severity"], row["accuracy"], row["estimated"]) for row in rows] == [
        ("fog", 1, 0.88, 0.86),  # by the largest windows
        ("snow", 3, 0.60, 0.56),
        ("gaussian_blur", 5, 0.10, 0.9),
    ]
    assert math.isnan(drift_summary.severity_rows([FOG._replace(estimates=[])])[0]["estimated"])
    powers = drift_summary.power_rows(ALL, ALARMS)
    assert [(row["window"], row["severity"], row["detected"], row["bbsds_ks"]) for row in powers] == [
        (10, 1, 0.2, 0.1),
        (10, 3, 0.8, 0.4),
        (50, 1, 1.0, 0.05),
        (50, 3, 1.0, 0.2),
    ]
    assert [(row["kind"], row["window"], row["estimated"]) for row in drift_summary.estimate_rows(ALL)] == [
        (each.kind, each.window, each.estimates["adapted"]) for one in ALL for each in one.estimates
    ]
