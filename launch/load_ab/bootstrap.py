"""Intervals by resampling what was measured (`scipy.stats.bootstrap`, percentile method, a fixed seed)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 0
BATCH_VALUES = 1 << 24  # resampled numbers held at a time, 128 MiB


class Estimate(NamedTuple):
    """A value and its interval; `low` and `high` None: one measurement has no spread. n: how many values were resampled."""

    value: float
    low: float | None
    high: float | None
    n: int


def mean(values: Sequence[float]) -> Estimate:
    """Mean over repeats. With n values only n**n resamples differ: an interval of two or three repeats is narrow by nature."""
    value = float(np.mean(values))
    if len(values) < 2:
        return Estimate(value, None, None, len(values))
    interval = _bootstrap(values, np.mean).confidence_interval
    return _estimate(value, interval.low, interval.high, len(values))


def percentiles(values: Sequence[float], wanted: Sequence[int]) -> list[Estimate]:
    """Percentiles of requests, pooled over repeats, one estimate for each of `wanted` (0..100)."""
    found = np.percentile(values, wanted)
    if len(values) < 2:
        return [Estimate(float(value), None, None, len(values)) for value in found]
    interval = _bootstrap(values, lambda sample, axis: np.percentile(sample, wanted, axis=axis)).confidence_interval
    return [_estimate(value, low, high, len(values)) for value, low, high in zip(found, interval.low, interval.high)]


def _estimate(value: float, low: float, high: float, n: int) -> Estimate:
    """The interval always holds the value; by rounding alone it can end a last digit beside it."""
    return Estimate(float(value), float(min(low, value)), float(max(high, value)), n)


def _bootstrap(values: Sequence[float], statistic):
    return stats.bootstrap(
        (np.asarray(values, float),), statistic, vectorized=True, method="percentile", rng=np.random.default_rng(SEED),
        n_resamples=RESAMPLES, confidence_level=CONFIDENCE, batch=max(1, BATCH_VALUES // len(values)), axis=-1,
    )  # fmt: skip
