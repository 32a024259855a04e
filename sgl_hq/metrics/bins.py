"""A histogram as plain numbers: the scheduler counts here, and the exporter copies what is new at most once a second."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from operator import add
from typing import NamedTuple


class Bins(NamedTuple):
    """counts[i]: values v with bounds[i - 1] < v <= bounds[i]; the last count has no upper bound. total: sum of the values.

    A plain tuple, because one is made for every forward.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float = 0

    @classmethod
    def of(cls, bounds: tuple[float, ...], values: Iterable[float] = ()) -> Bins:
        counts, total = [0] * (len(bounds) + 1), 0
        for value in values:
            counts[bisect_left(bounds, value)] += 1
            total += value
        return cls(bounds, tuple(counts), total)

    def __add__(self, other: Bins) -> Bins:
        return Bins(self.bounds, tuple(map(add, self.counts, other.counts)), self.total + other.total)

    def with_value(self, value: float) -> Bins:
        return self + Bins.of(self.bounds, (value,))

    def describe(self) -> dict[str, list | float]:
        """For /server_info."""
        return {"bounds": list(self.bounds), "counts": list(self.counts), "total": self.total}


SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
NO_TIMES = Bins.of(SECONDS)

# Requests of a group: the query rows that read its pages together.
GROUP_REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
NO_GROUPS = Bins.of(GROUP_REQUESTS)
