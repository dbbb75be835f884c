"""What the detector is measured with: the split, simulated drift, published methods, false alarms."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import special, stats

from stages.core import drift_check
from stages.core.corruptions import FAMILIES, SEVERITIES, corrupt
from stages.core.damage import damage_inputs, fit_damage, probability_right
from stages.core.detector import SizedDamage
from stages.core.drift_check import (
    Condition,
    Drifted,
    Parts,
    adapted_images,
    alarm_rate,
    estimates_of,
    false_alarms,
    fit_sized_damage,
    gauge,
    is_right,
    kinds_and_severities,
    measure_condition,
    possible_sizes,
    simulate,
    softmax_ks_alarms,
    split,
)
from stages.core.features import Features
from stages.core.measures import fit_projection
from stages.core.two_sample import draw_windows
from tests.stages.core.test_features import extractor
from tests.synthetic import NUM_CLASSES, classes_of, clouds, detector, features


@pytest.mark.parametrize("count", [8, 53, 100, 1001])
def test_the_split_is_disjoint_and_covers(count: int) -> None:
    parts = split(count, np.random.default_rng(0))
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(count))
    assert all((np.diff(part) > 0).all() for part in parts)
    assert len(parts.reference) == pytest.approx(0.15 * count, abs=0.5)
    assert len(parts.threshold) == pytest.approx(0.425 * count, abs=0.5)
    other = split(count, np.random.default_rng(1))
    assert not np.array_equal(parts.threshold, other.threshold)


@pytest.mark.parametrize(
    ("threshold", "check", "expected"),
    [(400, 400, [5, 20, 100]), (399, 400, [5, 20]), (400, 199, [5, 20]), (24, 400, [5]), (16, 400, [4]), (3, 3, [2])],
)
def test_sizes_are_those_that_a_quarter_and_a_half_allow(threshold: int, check: int, expected: list[int]) -> None:
    """A quarter of the threshold images, half of the check images; the largest possible where none is."""
    parts = Parts(np.arange(10), np.arange(threshold), np.arange(check))
    assert possible_sizes([5, 20, 100], parts, 500) == (expected if threshold > 24 else [min(expected)])
    assert possible_sizes([5, 20, 100], parts, 99) == [size for size in expected if size < 100]
    assert possible_sizes([5, 20, 100], parts, 3) == [min(3, *expected)]


def test_a_large_set_is_not_all_held_in_memory() -> None:
    parts = split(50_000, np.random.default_rng(0))
    assert [len(part) for part in parts] == [7500, 4000, 4000]
    assert len(np.unique(np.concatenate(parts))) == 15_500, "disjoint, and some are in none"


def test_adapted_images_are_whole_windows() -> None:
    assert adapted_images([5, 30, 100, 256], 250) == {5: 100, 30: 90, 100: 200}
    assert adapted_images([5, 30], 12) == {5: 10}
    assert adapted_images([5], 5) == {5: 5}


def test_every_kind_is_tried_at_every_severity() -> None:
    assert set(kinds_and_severities()) == {(kind, severity) for kind in FAMILIES for severity in SEVERITIES}
    assert len(kinds_and_severities()) == 5 * len(FAMILIES)


def test_simulated_drift_is_the_corruption_keyed_by_the_image() -> None:
    images, looking, indices = clouds(9, 32, 32), extractor(), np.array([7, 2, 4, 5])
    chosen = [Condition("clean", 0, indices, {2: 4}), Condition("fog", 3, indices, {2: 4, 3: 3})]
    clean, foggy = simulate(images, chosen, looking, 11)
    assert (clean.kind, clean.severity, foggy.kind, foggy.severity) == ("clean", 0, "fog", 3)
    for found, pixels in ((clean, images[indices]), (foggy, corrupt(images[indices], "fog", 3, indices, 11))):
        for part, expected in zip(astuple(found.features), astuple(looking.features(pixels)), strict=True):
            assert np.array_equal(part, expected)
        assert np.array_equal(found.indices, indices)
        for size, adapted in found.adapted.items():
            assert adapted is not None
            expected_adapted = looking.adapted_logits(pixels[: 4 // size * size], size)
            assert expected_adapted is not None
            np.testing.assert_allclose(adapted, expected_adapted)


def drifted(
    kind: str, severity: int, seed: int, wrong: float = 0.0, count: int = 60
) -> tuple[Drifted, NDArray[np.int64]]:
    """A condition under which a share of the predictions is wrong, and labels of its images."""
    some = features(count, seed)
    labels = some.logits.argmax(axis=1)
    labels = np.where(np.arange(count) < wrong * count, (labels + 1) % NUM_CLASSES, labels).astype(np.int64)
    return Drifted(kind, severity, np.arange(count), some, {10: None}), labels


def test_right_is_by_the_labels_of_the_images_that_were_drawn() -> None:
    some, labels = drifted("fog", 1, 0, wrong=0.25)
    everything = np.full(1000, -1)
    indices = np.arange(60) * 3 + 5
    everything[indices] = labels
    assert is_right(some._replace(indices=indices), everything).mean() == pytest.approx(0.75)


def test_an_unseen_family_is_left_out_of_its_own_fit() -> None:
    """Three families that the model gets right, one that it gets wrong: only fits with it know of wrong ones."""
    kinds = ("gaussian_noise", "defocus_blur", "snow", "pixelate")
    some = [drifted(kind, 3, seed)[0] for seed, kind in enumerate(kinds)]
    # One label array serves all: the images of the families are different ones.
    labels = np.concatenate([one.features.logits.argmax(axis=1) for one in some])
    labels[60:120] = (labels[60:120] + 1) % NUM_CLASSES
    some = [one._replace(indices=np.arange(60) + 60 * number) for number, one in enumerate(some)]
    clean, _ = drifted("clean", 0, 9)
    labels = np.concatenate([labels, clean.features.logits.argmax(axis=1)])
    clean = clean._replace(indices=np.arange(240, 300))
    sized, without = fit_sized_damage([clean, *some], labels, 10)
    inputs = [damage_inputs(one.features.logits, None) for one in [clean, *some]]
    right = [is_right(one, labels) for one in [clean, *some]]
    assert set(without) == {"noise", "blur", "weather", "digital"}
    for family, model in without.items():
        seen = [number for number in range(5) if number == 0 or FAMILIES[kinds[number - 1]] != family]
        expected = fit_damage(
            np.concatenate([inputs[number] for number in seen]), np.concatenate([right[number] for number in seen])
        )
        assert model == expected
    assert probability_right(without["blur"], inputs[2]).mean() > 0.9
    assert sized.model == fit_damage(np.concatenate(inputs), np.concatenate(right))
    assert sized.window == 10
    assert sized.error > 0.4, "what the blur's fit is off by, over four conditions"


def test_the_error_is_nothing_where_counting_explains_it() -> None:
    """Labels that are drawn from the estimate itself: the squared error is what drawing 60 of them gives."""
    rng = np.random.default_rng(0)
    some = [
        drifted(kind, severity, 7 * number + severity)[0] for number, kind in enumerate(FAMILIES) for severity in (1, 2)
    ]
    predicted = np.concatenate([one.features.logits.argmax(axis=1) for one in some])
    labels = np.where(rng.random(len(predicted)) < 0.7, predicted, (predicted + 1) % NUM_CLASSES).astype(np.int64)
    some = [one._replace(indices=np.arange(60) + 60 * number) for number, one in enumerate(some)]
    sized, _ = fit_sized_damage(some, labels, 10)
    assert sized.error < 0.045, "counting alone gives 0.059"
    assert probability_right(sized.model, damage_inputs(some[0].features.logits, None)).mean() == pytest.approx(
        0.7, abs=0.03
    )


def test_estimates_are_one_a_window() -> None:
    some, labels = drifted("fog", 2, 0, wrong=0.25, count=64)
    judge = detector()
    sized = SizedDamage(window=10, model=judge.spec.damage[0].model, error=0.02)
    found = list(estimates_of(some, labels, 10, sized, judge.spec.damage[0].model, judge.spec.baselines))
    assert len(found) == 6
    right = is_right(some, labels)
    for number, one in enumerate(found):
        assert one.true == right[10 * number : 10 * number + 10].mean()
        assert one.estimates["adapted"] == pytest.approx(0.5, abs=0.01)
        assert one.high - one.low == pytest.approx(2 * 1.96 * (0.02**2 + 0.25 / 10) ** 0.5, rel=0.01)
        assert len(one.estimates) == 4


@pytest.mark.parametrize("shift", [0.0, 0.8])
def test_softmax_alarms_are_those_of_scipys_test(shift: float) -> None:
    rng = np.random.default_rng(0)
    reference = special.softmax(rng.normal(0, 2, (300, 5)), axis=1)
    fresh = special.softmax(rng.normal(0, 2, (200, 5)) + shift * np.eye(5)[0], axis=1)
    windows = draw_windows(200, 60, 40, rng)
    smallest = [
        5 * min(stats.ks_2samp(fresh[window, label], reference[:, label], method="asymp").pvalue for label in range(5))
        for window in windows
    ]
    for alpha in (0.02, 0.1, 0.5):
        # Both are asymptotic, by other formulas: p-values within a tenth of alpha may fall on either side.
        low, high = (np.mean([p_value <= factor * alpha for p_value in smallest]) for factor in (0.8, 1.25))
        assert low <= softmax_ks_alarms(reference, fresh, windows, alpha) <= high
    assert (np.median(smallest) < 0.1) == (shift > 0)


def test_false_alarms_are_near_alpha() -> None:
    found = false_alarms(features(1200, 0), [10, 40], 4, alpha=0.05, resplits=12, num_windows=199, seed=0)
    assert list(found) == [10, 40]
    for rates in found.values():
        assert len(rates.rates) == 12
        assert rates.mean == pytest.approx(np.mean(rates.rates))
        assert rates.worst == max(rates.rates)
        assert 0.015 < rates.mean < 0.1
    again = false_alarms(features(1200, 0), [10, 40], 4, alpha=0.05, resplits=12, num_windows=199, seed=0)
    assert again == found


def test_the_gauge_measures_what_was_put_in() -> None:
    judge = detector()
    clean, strong = features(300, 30), features(100, 31, looks=1.0)
    labels = classes_of(300, 30)
    unseen = {10: dict.fromkeys(sorted(set(FAMILIES.values())), judge.spec.damage[0].model)}
    measures = gauge(judge, [10], clean, labels, unseen)
    same = Drifted("fog", 1, np.arange(100), clean.rows(np.arange(100)), {10: None})
    moved = Drifted("fog", 5, np.arange(100), strong, {10: None})
    before, after = (measure_condition(one, measures, [0.1, 0.5]) for one in (same, moved))
    assert before.accuracy == (same.features.logits.argmax(axis=1) == labels[:100]).mean()
    assert before.detected[10] < 0.1
    assert after.detected[10] > 0.95
    assert set(after.contaminated) == {0.1, 0.5}
    assert before.contaminated[0.5] < 0.25 < after.contaminated[0.5]
    assert after.contaminated[0.1] < after.contaminated[0.5]
    assert set(after.baselines) == {"bbsds_ks", "embedding_mmd"}
    assert max(rates[10] for rates in after.baselines.values()) < 0.2, "neither looks at looks"
    assert len(after.estimates) == 10
    assert alarm_rate(measures, judge.population(strong), 10, 0.01) == after.detected[10]


def test_the_published_methods_answer_to_the_embedding_and_the_outputs() -> None:
    judge = detector(alpha=0.05)
    clean, shifted = features(300, 30), features(100, 31, inside=1.5)
    measures = gauge(judge, [40], clean, classes_of(300, 30), {})
    for some, least, most in ((shifted, 0.9, 1.0), (clean, 0.0, 0.2)):
        rates = drift_check.public_methods(measures, [40], some, judge.population(some))
        assert least <= rates["embedding_mmd"][40] <= most
    faint = Features(0.2 * clean.logits, clean.embedding, clean.statistics)
    rates = drift_check.public_methods(measures, [40], faint, judge.population(faint))
    assert rates["bbsds_ks"][40] > 0.9


@pytest.mark.parametrize("count", [20, 30])
def test_the_fewest_images_that_the_stage_takes_can_be_split_and_fitted(count: int) -> None:
    some = features(count, 0)
    projection = fit_projection(some.rows(split(count, np.random.default_rng(0)).reference), 4)
    assert all(np.isfinite(values).all() for values in projection)
