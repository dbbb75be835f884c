"""Measures: normal scores, whatever goes in."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special, stats

from stages.core.features import Features
from stages.core.image_statistics import STATISTICS
from stages.core.measures import (
    OUTPUTS,
    TESTED_GROUPS,
    fit_projection,
    measure,
    measure_groups,
    measure_names,
    output_measures,
)
from tests.synthetic import DIM, features


def test_fresh_images_of_the_population_have_standard_normal_scores() -> None:
    projection = fit_projection(features(2000, 0), 6)
    scores = measure(features(1500, 1), projection)
    assert scores.shape == (1500, len(measure_names(projection)))
    assert np.abs(scores.mean(axis=0)).max() < 5 * (1 / 1500 + 1 / 2000) ** 0.5
    assert np.abs(scores.std(axis=0) - 1).max() < 0.1
    assert max(stats.kstest(column, "norm").statistic for column in scores.T) < 0.06


def test_scores_of_the_reference_are_the_normal_quantiles_of_its_ranks() -> None:
    reference = features(50, 0)
    scores = measure(reference, fit_projection(reference, 4))
    expected = stats.norm.ppf(np.arange(1, 51) / 51)
    column = list(STATISTICS).index("noise")
    np.testing.assert_allclose(scores[np.argsort(reference.statistics[:, column]), column], expected)


def test_no_outlier_is_far_out() -> None:
    projection = fit_projection(features(100, 0), 4)
    wild = features(20, 1)
    wild = Features(wild.logits * 1000, wild.embedding * 1e4, wild.statistics * -1e6)
    scores = measure(wild, projection)
    assert np.abs(scores).max() <= stats.norm.ppf(100.5 / 101) + 1e-9
    assert np.isfinite(scores).all()


def test_names_and_groups_agree_with_the_columns() -> None:
    reference = features(300, 0)
    projection = fit_projection(reference, 5)
    names, groups = measure_names(projection), measure_groups(projection)
    assert len(names) == len(set(names)) == projection.ordered.shape[1]
    assert tuple(names[groups["output"]]) == OUTPUTS
    assert names[groups["image"]] == [*STATISTICS, "image_distance"]
    assert names[groups["axes"]] == [f"embedding_{axis}" for axis in range(1, 6)]
    assert names[groups["embedding"]] == ["embedding_distance", "embedding_residual", *names[groups["axes"]]]
    assert sum(groups[name].stop - groups[name].start for name in TESTED_GROUPS) == len(names)
    noise, entropy = reference.statistics[:, STATISTICS.index("noise")], output_measures(reference.logits)[:, 1]
    assert np.array_equal(projection.ordered[:, names.index("noise")], np.sort(noise))
    assert np.array_equal(projection.ordered[:, names.index("entropy")], np.sort(entropy))


def test_each_group_answers_to_what_it_is_made_of() -> None:
    projection = fit_projection(features(500, 0), 4)
    groups, plain = measure_groups(projection), features(200, 1)
    clean = measure(plain, projection)
    for changed, moved in (
        (Features(plain.logits, plain.embedding, plain.statistics + 1), {"image"}),
        (Features(plain.logits / np.float32(10), plain.embedding, plain.statistics), {"output"}),
        (Features(plain.logits, plain.embedding + 1, plain.statistics), {"embedding"}),
    ):
        scores = measure(changed, projection)
        assert {name for name in TESTED_GROUPS if np.abs((scores - clean)[:, groups[name]]).max() > 0.1} == moved


def test_outputs_are_scipys() -> None:
    logits = np.random.default_rng(0).normal(0, 5, (40, 6)).astype(np.float32)
    logits[0] = [1000, 0, 0, 0, 0, -1000]
    found, probabilities = output_measures(logits), special.softmax(logits.astype(np.float64), axis=1)
    np.testing.assert_allclose(found[:, 0], probabilities.max(axis=1))
    np.testing.assert_allclose(found[:, 1], stats.entropy(probabilities, axis=1), atol=1e-12)
    np.testing.assert_allclose(found[:, 2], special.logsumexp(logits.astype(np.float64), axis=1))


def test_distances_are_mahalanobis_and_the_residual_is_the_rest() -> None:
    reference = features(400, 0)
    projection = fit_projection(reference, 5)
    names = measure_names(projection)
    raw = {name: projection.ordered[:, column] for column, name in enumerate(names)}
    centred = reference.embedding - reference.embedding.mean(axis=0, dtype=np.float64)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    along = centred @ axes[:5].T
    np.testing.assert_allclose(raw["embedding_distance"], np.sort((along**2 / along.var(0, ddof=1)).sum(1)), rtol=1e-6)
    np.testing.assert_allclose(raw["embedding_residual"], np.sort(((centred @ axes[5:].T) ** 2).sum(1)), rtol=1e-6)
    looks = reference.statistics.astype(np.float64)
    away = looks - looks.mean(axis=0)
    mahalanobis = ((away @ np.linalg.inv(np.cov(looks, rowvar=False))) * away).sum(axis=1)
    np.testing.assert_allclose(raw["image_distance"], np.sort(mahalanobis), rtol=0.01)
    np.testing.assert_allclose(projection.axes.T @ projection.axes, np.eye(5), atol=1e-9)


def test_a_monotone_transformation_of_a_statistic_does_not_change_its_scores() -> None:
    reference, fresh = features(300, 0), features(80, 1)
    columns = slice(0, len(STATISTICS))
    plain = measure(fresh, fit_projection(reference, 4))[:, columns]
    for some in (reference, fresh):
        some.statistics[:] = np.exp(some.statistics)
    assert np.array_equal(measure(fresh, fit_projection(reference, 4))[:, columns], plain)


@pytest.mark.parametrize(("count", "expected"), [(8, 2), (20, 5), (400, DIM)])
def test_axes_are_a_quarter_of_the_images_and_the_dimensions_at_most(count: int, expected: int) -> None:
    projection = fit_projection(features(count, 0), 100)
    assert projection.axes.shape == (DIM, expected)
    assert np.isfinite(measure(features(30, 1), projection)).all()
    assert np.isfinite(projection.precision).all()


def test_precisions_are_positive_definite_and_near_the_inverse_covariance() -> None:
    projection = fit_projection(features(4000, 0), 4)
    scores, groups = measure(features(4000, 0), projection), measure_groups(projection)
    for name in TESTED_GROUPS:
        block = projection.precision[groups[name], groups[name]]
        assert np.linalg.eigvalsh(block).min() > 0
        if name == "output":  # confidence and entropy say the same here: the ridge decides
            continue
        np.testing.assert_allclose(block @ np.cov(scores[:, groups[name]], rowvar=False), np.eye(len(block)), atol=0.15)
    blocks = sum(np.count_nonzero(projection.precision[groups[name], groups[name]]) for name in TESTED_GROUPS)
    assert np.count_nonzero(projection.precision) == blocks


def test_constant_columns_give_scores_of_zero() -> None:
    reference, fresh = features(60, 0), features(30, 1)
    reference.statistics[:, :3] = 0.7
    fresh.statistics[:, :3] = 0.7
    reference.logits[:], fresh.logits[:] = 0, 0
    projection = fit_projection(reference, 4)
    scores = measure(fresh, projection)
    assert (scores[:, :3] == 0).all()
    assert (scores[:, measure_groups(projection)["output"]] == 0).all()
    assert np.isfinite(scores).all()
    assert np.isfinite(projection.precision).all()


def test_a_constant_embedding_gives_no_nan() -> None:
    reference = features(60, 0)
    reference.embedding[:] = 1.5
    projection = fit_projection(reference, 4)
    assert projection.axes.shape[1] == 1
    assert np.isfinite(measure(features(30, 1), projection)).all()
