"""What a soak has seen, and whether it is what a sound server shows."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

MIB = 2**20


class Sample(NamedTuple):
    """host: bytes that only the server's processes hold, in memory or swapped out; device: bytes taken on the GPU; *_full: share of a
    tier that is in use."""

    host: int
    device: int
    dense_full: float
    packed_full: float
    pages_dropped: int


@dataclass
class Report:
    outcome: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    filled_s: float = 0.0  # until the pool was full
    tokens: int = 0  # generated in answers that came whole
    longest_prompt: int = 0

    def column(self, name: str, part: tuple[float, float] = (0, 1)) -> list[float]:
        """One field of the samples between two fractions of the time."""
        start, end = (int(at * len(self.samples)) for at in part)
        return [getattr(sample, name) for sample in self.samples[start:end]]

    def growth(self, name: str) -> float:
        """Bytes by which the last sixth of the time is above the sixth after the first third, the warm-up. The least of each is
        compared: a forward under way takes hundreds of MiB that it gives back."""
        return min(self.column(name, (5 / 6, 1))) - min(self.column(name, (1 / 3, 1 / 2)))


def problems(report: Report, host_growth: int, device_growth: int) -> list[str]:
    """What a soak must not show. *_growth: bytes that may be added after the first third of the time."""
    given_up = sum(report.outcome[kind] for kind in ("hang up", "give up", "aborted")) / sum(report.outcome.values())
    holds = {
        "given up by their clients, not about a fifth": 0.12 < given_up < 0.3,
        "the packed tier was not full": statistics.median(report.column("packed_full")) > 0.8,  # dropping a node makes more room than a page
        "the dense tier was hardly used": statistics.median(report.column("dense_full")) > 0.5,  # what it held moves on to the packed one
        "nothing was evicted": report.samples[0].pages_dropped < report.samples[-1].pages_dropped,
        f"host memory grew by {report.growth('host') / MIB:.0f} MiB": report.growth("host") < host_growth,
        f"device memory grew by {report.growth('device') / MIB:.0f} MiB": report.growth("device") < device_growth,
    }
    return report.failures + [what for what, true in holds.items() if not true]


def summary(report: Report) -> str:
    """One line for a person: four parts of the time beside each other, the least memory and the median of the rest."""
    requests = f"{sum(report.outcome.values())} requests {dict(report.outcome)}, {report.tokens} tokens generated"
    lines = [f"full after {report.filled_s:.0f} s", requests, f"prompts up to {report.longest_prompt} tokens"]
    fields = {"host": (min, MIB, "MiB"), "device": (min, MIB, "MiB"), "dense_full": (statistics.median, 0.01, "%"),
              "packed_full": (statistics.median, 0.01, "%"), "pages_dropped": (max, 1, "")}  # fmt: skip
    for name, (of, unit, word) in fields.items():
        parts = [f"{of(report.column(name, part)) / unit:.0f}" for part in ((0, 1 / 3), (1 / 3, 1 / 2), (1 / 2, 5 / 6), (5 / 6, 1))]
        lines.append(f"{name} {' -> '.join(parts)} {word}")
    return "; ".join(lines)
