"""What the packing tree has done since the start. Plain numbers, raised where things happen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sgl_hq.metrics.bins import NO_TIMES, Bins

# Why a node was not packed though policy or pressure wanted it; `refusals.py` has the sentences.
REFUSALS = ("too_large", "no_pages", "no_sinks", "unpackable")


@dataclass
class PackCounters:
    """pages_packed counts demoted pages too. *_times: seconds of the scheduler per node packed, per chain of nodes demoted (the
    packing inside included), per leaf dropped. slabs_*: moves of memory to the packed tier and, under pressure, back."""

    nodes_packed: int = 0
    pages_packed: int = 0
    pages_demoted: int = 0
    pages_dropped: int = 0
    dense_pages_dropped: int = 0
    slabs_lent: int = 0
    slabs_reclaimed: int = 0
    refused: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REFUSALS, 0))
    pack_times: Bins = NO_TIMES
    demote_times: Bins = NO_TIMES
    drop_times: Bins = NO_TIMES

    def packed(self, pages: int, seconds: float) -> None:
        self.nodes_packed += 1
        self.pages_packed += pages
        self.pack_times = self.pack_times.with_value(seconds)

    def demoted(self, pages: int, seconds: float) -> None:
        self.pages_demoted += pages
        self.demote_times = self.demote_times.with_value(seconds)

    def dropped(self, pages: int, was_packed: bool, seconds: float) -> None:
        if was_packed:
            self.pages_dropped += pages
        else:
            self.dense_pages_dropped += pages
        self.drop_times = self.drop_times.with_value(seconds)

    def totals(self) -> dict[str, Any]:
        """For /server_info."""
        return {
            "nodes_packed": self.nodes_packed,
            "pages_packed": self.pages_packed,
            "pages_demoted": self.pages_demoted,
            "pages_dropped": self.pages_dropped,
            "dense_pages_dropped": self.dense_pages_dropped,
            "slabs_lent": self.slabs_lent,
            "slabs_reclaimed": self.slabs_reclaimed,
            "refused": dict(self.refused),
        }

    def times(self) -> dict[str, dict]:
        """For /server_info: histograms by operation."""
        return {"pack": self.pack_times.describe(), "demote": self.demote_times.describe(), "drop": self.drop_times.describe()}
