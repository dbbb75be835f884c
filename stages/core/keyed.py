"""Randomness that is a function of its keys.

Nothing is consumed, so that neither order, batch size, workers nor resuming can change it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def uniforms(seed: int, epoch: int, indices: NDArray[np.int64], num_draws: int) -> NDArray[np.float64]:
    """Independent uniform numbers in [0, 1), float64 (len(indices), num_draws), keyed by (seed, epoch, index, draw).

    SplitMix64 as a counter-based generator (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
    generators"): the key is mixed in step by step, the draw number is the counter.
    """
    with np.errstate(over="ignore"):
        key = _mix(_mix(np.uint64(seed)) ^ np.uint64(epoch))
        streams = _mix(key ^ indices.astype(np.uint64))
        counters = np.arange(1, num_draws + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bits = _mix(streams[:, None] + counters[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def seed_for(*keys: int) -> int:
    """A seed (64 bits) for a generator, keyed by numbers such as (seed, step, rank)."""
    mixed: np.uint64 | NDArray[np.uint64] = np.uint64(0)
    with np.errstate(over="ignore"):
        for key in keys:
            mixed = _mix(mixed ^ np.uint64(key))
    return int(mixed)


def _mix(value: np.uint64 | NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = np.asarray(value, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
