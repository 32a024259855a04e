"""The scorecards: which figures stand in which table, under which heading and unit, and the text of one cell.

Terminal, page and README show the same columns. A memory figure never stands in a table with a latency.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from sgl_hq.launch.load_ab.refusals import GROWING_PROMPTS
from sgl_hq.launch.load_ab.result_view import Case, ResultView, Row

MISSING = "-"
LEGEND = (
    "Cells: mean over the repeats, for p50, p90 and p99 the quantile of the requests of all repeats; its ratio to {reference}, without "
    "judgement; 95 % bootstrap interval, for the task score over the questions (none with one repeat, or where all show the same)."
)


class Column(NamedTuple):
    """One figure of a scorecard. `better`: +1 where more is better, -1 where less is, 0 where neither; `scale`: units a shown unit."""

    figure: str
    name: str
    unit: str
    digits: int
    better: int
    scale: float = 1
    ratio: bool = True  # fractions and gains are ratios already

    @property
    def heading(self) -> str:
        return f"{self.name}, {self.unit}" if self.unit else self.name


class Cell(NamedTuple):
    """Texts; `ratio` and `interval` may be empty."""

    value: str
    ratio: str = ""
    interval: str = ""


@dataclass(frozen=True)
class Card:
    """One table of a case. Where it is split for want of width, every part has the first `kept` columns."""

    name: str
    columns: tuple[Column, ...]
    kept: int = 0


def _times(key: str, name: str, digits: int) -> tuple[Column, ...]:
    return tuple(Column(f"{key}_{q}", f"{name} {q}", "ms", digits, -1) for q in ("p50", "p90", "p99"))


MEMORY = Card(
    "Memory",
    (
        Column("reuse_factor", "reuse factor", "", 2, 0, ratio=False),
        Column("packed_fraction", "packed fraction p", "", 2, 0, ratio=False),
        Column("kv_bytes_allocated", "KV allocated", "MB", 0, 0, 1e6),
        Column("kv_bytes_used_peak", "KV used at peak", "MB", 0, -1, 1e6),
        Column("kv_bytes_used_mean", "KV used, time mean", "MB", 0, -1, 1e6),
        Column("host_kv_bytes", "host KV", "MB", 0, -1, 1e6),
        Column("resident_tokens_peak", "resident tokens at peak", "", 0, 1),
        Column("resident_tokens_mean", "resident tokens, time mean", "", 0, 1),
        Column("bytes_per_resident_token", "bytes a resident token", "", 0, -1),
        Column("packed_fraction_peak", "p at peak", "", 2, 0, ratio=False),
        Column("modelled_gain", "gain, modelled", "", 2, 0, ratio=False),
        Column("measured_gain", "gain, measured", "", 2, 0, ratio=False),
        Column("max_context_tokens", "longest request", "tokens", 0, 1),
        Column("max_running", "most running", "", 0, 1),
    ),
    kept=2,  # no memory row without its reuse factor and p
)
LATENCY = Card(
    "Latency and throughput",
    (
        Column("requests_s", "requests/s", "", 2, 1),
        Column("output_tok_s", "output tokens/s", "", 1, 1),
        *_times("ttft_ms", "TTFT", 0),
        *_times("tpot_ms", "TPOT", 2),
        *_times("e2e_ms", "E2E", 0),
    ),
)
CACHE = Card(
    "Cache and answers",
    (
        Column("logical_tokens_attended", "logical tokens attended", "", 0, 0),
        Column("hit_rate", "hit rate", "", 3, 1),
        Column("ideal_hit_rate", "ideal hit rate", "", 3, 0, ratio=False),
        Column("evicted_tokens", "evicted tokens", "", 0, -1),
        Column("recomputed_tokens", "recomputed tokens", "", 0, -1),
        Column("retractions", "retractions", "", 0, -1),
        Column("task_score", "task score", "", 3, 1),
        Column("requests_failed", "failed requests", "", 0, -1),
    ),
)
CARDS = (MEMORY, LATENCY, CACHE)


def cell(view: ResultView, arm: str, case: Case, column: Column) -> Cell:
    """Value in the column's unit, ratio to the first arm, interval; "-" where it was not measured."""
    figure = view.figure(arm, case, column.figure)
    if figure is None:
        return Cell(MISSING)
    value, low, high = (
        None if figure[part] is None else f"{figure[part] / column.scale:,.{column.digits}f}" for part in ("mean", "low", "high")
    )
    interval = f"{low} to {high}" if low is not None and (low, high) != (value, value) else ""
    reference = view.mean(view.arms[0], case, column.figure)
    ratio = f"{figure['mean'] / reference:.2f}x" if column.ratio and reference else ""
    return Cell(value, ratio, interval)


def budget_line(view: ResultView) -> str:
    """The KV bytes of every arm, how they were made equal, and what lies in host memory beside them."""
    equal = view.result["equal_bytes"]
    arms = equal["arms"].items()
    allocated = ", ".join(f"{arm} {facts['allocated_bytes'] / 1e6:,.1f}" for arm, facts in arms)
    host = ", ".join(f"{arm} {facts['host_bytes'] / 1e6:,.1f} MB" for arm, facts in arms if facts["host_bytes"])
    return (
        f"Equal KV bytes: {equal['budget_bytes'] / 1e6:,.1f} MB an arm. {equal['how']} "
        f"Allocated, MB: {allocated}. KV in host memory besides: {host or 'none'}."
    )


def load_line(view: ResultView, case: Case) -> str:
    """What every arm was asked in one repeat of this case, and at what pace."""
    runs = view.all_runs(case)
    if not runs:
        return "No arm was measured."
    loads, load = [run["load"] for run in runs], runs[0]["load"]
    if load["context"] is None:
        prompts = f"with {_range(loads, 'prompt_tokens')} prompt tokens in all"
    elif runs[0]["kind"] in GROWING_PROMPTS:
        prompts = f"of up to {load['context']:,} prompt tokens"
    else:
        prompts = f"of {load['context']:,} prompt tokens each"
    outputs = f"{_range(loads, 'output_tokens')} output tokens in all"
    if runs[0]["kind"] == "trace":
        pace = "arriving as in the trace"
    else:
        pace = f"{load['concurrency']} at a time" if load["rate"] is None else f"{load['rate']:g} arriving a second on average"
    return f"{load['requests']:,} requests {prompts}, {outputs}, {pace}."


def _range(loads: list[Row], key: str) -> str:
    """Seeds differ between repeats, and answers that may end early between arms."""
    low, high = min(load[key] for load in loads), max(load[key] for load in loads)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
