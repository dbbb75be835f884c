"""Window tests: every test against a plain formula, and one p-value that keeps its level."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from stages.core import two_sample
from stages.core.measures import TESTED_GROUPS, Projection, fit_projection, measure, measure_groups
from stages.core.two_sample import (
    Calibration,
    Comparison,
    Indices,
    Population,
    Values,
    calibrate,
    class_shift,
    class_weights,
    compare_with,
    draw_windows,
    evidence,
    squared_mmd,
    windows_of,
)
from tests.synthetic import features

PROJECTION = fit_projection(features(200, 1), 4)


def population(count: int, seed: int, looks: float = 0.0, inside: float = 0.0) -> Population:
    some = features(count, seed, looks, inside)
    return Population(measure(some, PROJECTION), some.logits.argmax(axis=1).astype(np.int64))


def untied(count: int, seed: int, num_measures: int) -> Values:
    return np.random.default_rng(seed).normal(size=(count, num_measures))


NUM_MEASURES = PROJECTION.ordered.shape[1]


def test_distances_are_those_of_scipy() -> None:
    reference, fresh = untied(150, 0, NUM_MEASURES), untied(60, 1, NUM_MEASURES) + 0.3
    comparison = compare_with(Population(reference, np.zeros(150, dtype=np.int64)), PROJECTION)
    windows = draw_windows(60, 20, 7, np.random.default_rng(0))
    distances, means = two_sample._distances_and_means(comparison, fresh, windows)
    for row, window in enumerate(windows):
        for column in range(NUM_MEASURES):
            expected = stats.ks_2samp(fresh[window, column], reference[:, column]).statistic
            assert distances[row, column] == pytest.approx(expected, abs=1e-6)
        np.testing.assert_allclose(means[row], fresh[window].mean(axis=0))


def test_windows_in_many_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, comparison = population(60, 5), compare_with(population(100, 4), PROJECTION)
    windows = draw_windows(60, 9, 11, np.random.default_rng(0))
    whole = evidence(comparison, fresh.values, windows)
    monkeypatch.setattr(two_sample, "_CHUNK", 1)
    for name, values in evidence(comparison, fresh.values, windows).items():
        np.testing.assert_allclose(values, whole[name], rtol=1e-12)


def test_weights_count_images_more_than_once() -> None:
    reference, fresh = untied(40, 0, NUM_MEASURES), untied(30, 1, NUM_MEASURES)
    times = np.random.default_rng(2).integers(1, 4, 40)
    weighted = compare_with(Population(reference, np.zeros(40, dtype=np.int64)), PROJECTION, times / times.sum())
    repeated = compare_with(Population(np.repeat(reference, times, axis=0), np.zeros(0, dtype=np.int64)), PROJECTION)
    repeated = replace(repeated, bandwidth=weighted.bandwidth)
    windows = draw_windows(30, 12, 5, np.random.default_rng(0))
    kernel = np.exp(-((repeated.points[:, None] - repeated.points) ** 2).sum(axis=2) / weighted.bandwidth)
    assert weighted.similarity == pytest.approx(kernel.mean())
    assert weighted.size == pytest.approx(times.sum() ** 2 / (times**2).sum())
    for found, expected in zip(
        two_sample._distances_and_means(weighted, fresh, windows),
        two_sample._distances_and_means(repeated, fresh, windows),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(weighted.mean, repeated.mean)
    repeated = replace(repeated, similarity=weighted.similarity)
    np.testing.assert_allclose(squared_mmd(weighted, fresh, windows), squared_mmd(repeated, fresh, windows))


def test_evidence_by_a_direct_formula() -> None:
    clean, fresh = population(120, 2), population(50, 3, looks=0.4)
    comparison = compare_with(clean, PROJECTION)
    windows = draw_windows(50, 15, 6, np.random.default_rng(0))
    found = evidence(comparison, fresh.values, windows)
    effective = 15 * 120 / (15 + 120)
    for name in TESTED_GROUPS:
        columns = measure_groups(PROJECTION)[name]
        precision = PROJECTION.precision[columns, columns]
        for row, window in enumerate(windows):
            shift = fresh.values[window][:, columns].mean(axis=0) - clean.values[:, columns].mean(axis=0)
            assert found[f"mean_{name}"][row] == pytest.approx(effective * shift @ precision @ shift)
    np.testing.assert_allclose(found["mmd"], effective * squared_mmd(comparison, fresh.values, windows))


def test_ks_evidence_is_the_largest_of_a_group_and_near_scipys_p_value() -> None:
    reference, fresh = untied(400, 0, NUM_MEASURES), untied(80, 1, NUM_MEASURES) + 0.2
    comparison = compare_with(Population(reference, np.zeros(400, dtype=np.int64)), PROJECTION)
    window = np.arange(80)[None]
    found = evidence(comparison, fresh, window)
    for name in TESTED_GROUPS:
        columns = range(*measure_groups(PROJECTION)[name].indices(NUM_MEASURES))
        p_values = [stats.ks_2samp(fresh[:, column], reference[:, column], method="exact").pvalue for column in columns]
        assert found[f"ks_{name}"][0] == pytest.approx(max(-np.log(p_values)), rel=0.1)


def test_mmd_is_the_double_loop() -> None:
    clean, fresh = population(30, 2), population(20, 3, inside=0.5)
    comparison = compare_with(clean, PROJECTION)
    axes = measure_groups(PROJECTION)["axes"]
    windows = draw_windows(20, 8, 3, np.random.default_rng(0))

    def mean_kernel(first: Values, second: Values) -> float:
        total = 0.0
        for one in first:
            for other in second:
                total += float(np.exp(-((one - other) ** 2).sum() / comparison.bandwidth))
        return total / (len(first) * len(second))

    reference = clean.values[:, axes]
    squares = [((one - other) ** 2).sum() for one in reference for other in reference]
    assert comparison.bandwidth == pytest.approx(np.median(squares))
    for value, window in zip(squared_mmd(comparison, fresh.values, windows), windows, strict=True):
        points = fresh.values[window][:, axes]
        expected = mean_kernel(points, points) - 2 * mean_kernel(points, reference) + mean_kernel(reference, reference)
        assert value == pytest.approx(expected)


def inside_and_rest(values: Values, window: Indices) -> tuple[Comparison, Comparison, float]:
    """The comparison with a whole population, that with the rest of it, and the stretch."""
    everything = Population(values, np.zeros(len(values), dtype=np.int64))
    whole = compare_with(everything, PROJECTION)
    rest = compare_with(everything.rows(np.setdiff1d(np.arange(len(values)), window)), PROJECTION)
    return whole, replace(rest, bandwidth=whole.bandwidth), len(values) / (len(values) - len(window))


def test_windows_inside_stretch_to_the_comparison_with_the_rest() -> None:
    values = untied(90, 0, NUM_MEASURES)
    window = draw_windows(90, 30, 1, np.random.default_rng(0))
    whole, rest, stretch = inside_and_rest(values, window[0])
    distances, means = two_sample._distances_and_means(whole, values, window)
    explicit, _ = two_sample._distances_and_means(rest, values, window)
    np.testing.assert_allclose(stretch * (means - whole.mean), means - rest.mean)
    # A window's image counts half below itself in the whole population: one half of one image of 90.
    np.testing.assert_allclose(stretch * distances, explicit, atol=stretch * 0.5 / 90 + 1e-6)
    kernel = np.exp(-((rest.points[:, None] - rest.points) ** 2).sum(axis=2) / whole.bandwidth)
    rest = replace(rest, similarity=float(kernel.mean()))
    np.testing.assert_allclose(stretch**2 * squared_mmd(whole, values, window), squared_mmd(rest, values, window))


def test_evidence_inside_is_that_against_the_rest() -> None:
    values = untied(90, 0, NUM_MEASURES)
    window = draw_windows(90, 30, 1, np.random.default_rng(0))
    whole, rest, _ = inside_and_rest(values, window[0])
    kernel = np.exp(-((rest.points[:, None] - rest.points) ** 2).sum(axis=2) / whole.bandwidth)
    rest = replace(rest, similarity=float(kernel.mean()))
    expected = evidence(rest, values, window)
    for name, found in evidence(whole, values, window, inside=True).items():
        np.testing.assert_allclose(found, expected[name], rtol=1e-5, err_msg=name)


def test_ties_do_not_count_as_distance() -> None:
    """Statistics have them: 60 % of the images may have no speckle at all."""
    reference = np.tile(np.r_[np.zeros(60), np.arange(1, 41)][:, None], NUM_MEASURES).astype(np.float64)
    comparison = compare_with(Population(reference, np.zeros(100, dtype=np.int64)), PROJECTION)
    window = np.arange(0, 100, 5)[None]
    distances, _ = two_sample._distances_and_means(comparison, reference, window)
    expected = stats.ks_2samp(reference[window[0], 0], reference[:, 0]).statistic
    np.testing.assert_allclose(distances, expected, atol=1e-6)


@pytest.mark.parametrize("size", [10, 40])
def test_p_values_of_fresh_windows_are_uniform(size: int) -> None:
    """Each of 20 detectors on 20 windows of fresh images: 400 alarms at 5 %, within binomial bounds."""
    p_values: list[float] = []
    for seed in range(20):
        clean, fresh = population(400, 100 + seed), population(20 * size, 200 + seed)
        comparison, rng = compare_with(clean, PROJECTION), np.random.default_rng(seed)
        null = draw_windows(400, size, 399, rng)
        calibration = calibrate(evidence(comparison, clean.values, null, inside=True))
        found = evidence(comparison, fresh.values, np.arange(20 * size).reshape(20, size))
        p_values += calibration.p_values(found).tolist()
    low, high = stats.binom.ppf([0.0005, 0.9995], 400, 0.05)
    assert low <= sum(p_value <= 0.05 for p_value in p_values) <= high
    # Windows of one detector share its calibration: the bounds are wider than those of 400 independent values.
    assert stats.kstest(p_values, "uniform").statistic < 0.12
    assert min(p_values) >= 1 / 400


@pytest.mark.parametrize(("looks", "inside"), [(1.0, 0.0), (0.0, 1.0)])
def test_a_large_shift_is_found_in_every_window(looks: float, inside: float) -> None:
    clean = population(400, 2)
    comparison, rng = compare_with(clean, PROJECTION), np.random.default_rng(0)
    calibration = calibrate(evidence(comparison, clean.values, draw_windows(400, 25, 199, rng), inside=True))
    drifted = population(200, 3, looks, inside)
    p_values = calibration.p_values(evidence(comparison, drifted.values, draw_windows(200, 25, 50, rng)))
    assert p_values == pytest.approx(1 / 200)


def test_p_values_count_the_clean_windows_with_as_much_evidence() -> None:
    calibration = Calibration({}, np.array([1.0, 2.0, 2.0, 3.0]))
    found = {"ks_image": np.array([0.5, 1.5, 2.0, 3.0, 9.0])}
    assert calibration.p_values(found).tolist() == [1.0, 4 / 5, 4 / 5, 2 / 5, 1 / 5]


def test_calibrated_quadratic_evidence_becomes_a_gamma_p_value() -> None:
    null = np.random.default_rng(0).chisquare(5, 20_000)
    calibration = calibrate({"mean_image": null})
    expected = np.sort(-stats.chi2.logsf(null, 5))
    np.testing.assert_allclose(
        np.quantile(calibration.combined, [0.1, 0.5, 0.9, 0.99]),
        np.quantile(expected, [0.1, 0.5, 0.9, 0.99]),
        rtol=0.05,
    )


def test_constant_measures_of_a_population_can_be_calibrated() -> None:
    """A classifier that says the same of every image: nothing moves, and nothing divides by it."""
    reference, clean = features(60, 0), features(80, 1)
    for some in (reference, clean):
        some.logits[:] = 0
    projection = fit_projection(reference, 4)
    constant = Population(measure(clean, projection), np.zeros(80, dtype=np.int64))
    comparison = compare_with(constant, projection)
    found = evidence(comparison, constant.values, draw_windows(80, 10, 99, np.random.default_rng(0)), inside=True)
    p_values = calibrate(found).p_values(found)
    assert p_values.min() == pytest.approx(1 / 50)


def test_windows_repeat_no_image_and_reach_all() -> None:
    windows = draw_windows(30, 12, 200, np.random.default_rng(0))
    assert windows.shape == (200, 12)
    assert all(len(set(window)) == 12 for window in windows.tolist())
    counts = np.bincount(windows.ravel(), minlength=30)
    assert stats.chisquare(counts).pvalue > 1e-4
    assert len(counts) == 30
    whole = draw_windows(5, 5, 3, np.random.default_rng(0))
    assert np.sort(whole, axis=1).tolist() == [[0, 1, 2, 3, 4]] * 3


def test_windows_have_the_classes_asked_for() -> None:
    pool = np.repeat([0, 1, 2], [40, 10, 6])
    labels = np.random.default_rng(1).choice([0, 1], size=(300, 7), p=[0.6, 0.4])
    labels[0] = 1
    windows = windows_of(labels, pool, np.random.default_rng(0))
    assert np.array_equal(pool[windows], labels)
    assert all(len(set(window.tolist())) == 7 for window in windows)
    counts = np.bincount(windows.ravel(), minlength=56)
    assert stats.chisquare(counts[:40]).pvalue > 1e-4, "every image of a class as often as any other"
    assert stats.chisquare(counts[40:50]).pvalue > 1e-4
    assert not counts[50:].any()


def test_a_window_may_have_more_of_a_class_than_the_pool() -> None:
    windows = windows_of(np.array([[1, 1, 1, 0], [0, 0, 1, 0]]), np.array([0, 0, 0, 1, 1]), np.random.default_rng(0))
    assert np.array_equal(np.sort(windows[0])[-3:], [3, 3, 4]) or np.array_equal(np.sort(windows[0])[-3:], [3, 4, 4])
    assert sorted(windows[1].tolist())[:3] == [0, 1, 2]


def test_weights_give_the_pool_the_classes_of_the_window() -> None:
    pool = np.repeat([0, 1, 2], [40, 10, 6])
    weights = class_weights(np.array([1.0, 3.0, 0.0]), pool)
    assert weights.sum() == pytest.approx(1)
    assert np.bincount(pool, weights) == pytest.approx([0.25, 0.75, 0])
    assert np.ptp(weights[pool == 1]) == 0


def test_class_shift_is_the_log_likelihood_ratio_of_a_table() -> None:
    pool = np.array([10, 20, 30, 40, 0])  # a class that neither has
    counts = np.array([[3, 2, 5, 10, 0], [0, 4, 6, 0, 0], [1, 2, 3, 4, 0]])
    found = class_shift(counts, pool)
    for value, row in zip(found, counts, strict=True):
        table = np.stack([row, pool - row])[:, :4]
        reference = stats.chi2_contingency(table, correction=False, lambda_="log-likelihood").statistic
        assert value == pytest.approx(reference)
    assert found[2] == pytest.approx(0)


def test_projection_is_not_fitted_to_the_population() -> None:
    comparison = compare_with(population(100, 2), PROJECTION)
    assert isinstance(PROJECTION, Projection)
    for name in TESTED_GROUPS:
        columns = measure_groups(PROJECTION)[name]
        assert np.array_equal(comparison.precision[name], PROJECTION.precision[columns, columns])
