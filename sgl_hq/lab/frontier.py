"""Every format on one model: the quality gate's own measurement, and cosines beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from sgl_hq.gate.figures import failing_bounds, summarize
from sgl_hq.gate.measure import PREFILL_COST
from sgl_hq.gate.run import GateModel, measure, total_cost
from sgl_hq.gate.windows import Window
from sgl_hq.lab.cosines import measure_cosines
from sgl_hq.prefix_codec import PrefixCodec


def frontier_rows(
    loaded: GateModel,
    windows: Sequence[Window],
    prefixes: Sequence[int],
    steps: int,
    codecs: Sequence[PrefixCodec],
    on_window: Callable[[str], None] = lambda name: None,
    advance: Callable[[int], None] = lambda cost: None,
) -> list[dict[str, Any]]:
    """One row for each format, smallest stored bits first: the gate's summary (figures.summarize), `failing_bounds` and the
    fields of Cosines. Arguments and errors as `gate.run.measure`; `advance` is called with `frontier_cost` in total.
    """
    trials = measure(loaded, windows, prefixes, steps, codecs, on_window, advance)
    on_window("cosines")
    texts = [window.token_ids(loaded.tokenizer, max(prefixes) + steps) for window in windows]
    cosines = measure_cosines(loaded.model, texts, prefixes, steps, codecs, lambda: advance(_cosine_cost(len(codecs))))
    rows = []
    for name, found in trials.items():
        summary = summarize(found)
        rows.append({"format": name, **summary, "failing_bounds": failing_bounds(summary), **asdict(cosines[name])})
    return sorted(rows, key=lambda row: row["stored_bits"])


def frontier_cost(windows: int, prefixes: int, codecs: int) -> int:
    return total_cost(windows, prefixes, codecs) + windows * prefixes * _cosine_cost(codecs)


def _cosine_cost(codecs: int) -> int:
    """Of one window and prefix: a prefill of its own, and each codec packs again."""
    return PREFILL_COST + codecs


def pareto(rows: Sequence[dict[str, Any]], figure: str, *, larger_is_better: bool = False) -> list[str]:
    """Formats that no smaller or equally large one matches in `figure`; rows as `frontier_rows` gives them."""
    sign, best, found = -1 if larger_is_better else 1, float("inf"), []
    for row in sorted(rows, key=lambda row: (row["stored_bits"], sign * row[figure])):
        if sign * row[figure] < best:
            best = sign * row[figure]
            found.append(row["format"])
    return found
