from __future__ import annotations

import numpy as np

from stages.core.keyed import seed_for, uniforms


def test_uniforms_depend_on_seed_epoch_and_index_alone() -> None:
    indices = np.arange(1000)
    whole = uniforms(1, 2, indices, 8)
    order = np.random.default_rng(0).permutation(1000)
    assert np.array_equal(uniforms(1, 2, indices[order], 8), whole[order]), "depends on the batch"
    assert np.array_equal(uniforms(1, 2, indices, 3), whole[:, :3]), "depends on the number of draws"
    for other in (uniforms(2, 2, indices, 8), uniforms(1, 3, indices, 8)):
        assert not np.isin(other, whole).any()


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    draws = uniforms(0, 0, np.arange(50_000), 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    histogram = np.histogram(draws, bins=50, range=(0, 1))[0]
    expected = draws.size / 50
    assert ((histogram - expected) ** 2 / expected).sum() < 90  # chi-squared, 49 degrees of freedom: p = 0.0003
    neighbours = np.stack([draws[:-1, 0], draws[1:, 0], draws[:-1, 1], uniforms(0, 1, np.arange(49_999), 1)[:, 0]])
    correlation = np.corrcoef(neighbours) - np.eye(4)
    assert np.abs(correlation).max() < 0.02


def test_uniforms_stay_the_same_in_every_release() -> None:
    """Changing them would change every model that is trained with the same seed."""
    assert uniforms(0, 0, np.array([0, 1]), 2).tolist() == PINNED


PINNED = [[0.049920065672091285, 0.6703283700586791], [0.18670452030252627, 0.45453079945154873]]


def test_seeds_depend_on_every_key_and_on_their_order() -> None:
    seeds = {seed_for(*keys) for keys in [(0, 0), (0, 1), (1, 0), (1, 1), (0,), (0, 0, 0), (2**62, 5)]}
    assert len(seeds) == 7
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert seed_for(3, 4, 5) == seed_for(3, 4, 5)
