"""Run rows -> one summary row for each arm, workload and phase: means over repeats with intervals.

Percentiles of latency are taken over the requests of all repeats together, the task score over the questions. An arm of which one repeat failed has no summary
figures (`refusals.py` says why).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from sgl_hq.launch.load_ab.bootstrap import Estimate, mean, percentiles
from sgl_hq.launch.load_ab.refusals import check_comparable

Row = dict[str, Any]
_PERCENTILE = re.compile(r"(\w+_ms)_p(\d+)")


def summarize(rows: Sequence[Row]) -> list[Row]:
    """Summary rows in the order of the run rows; raises Incomparable for rows that may not stand beside each other.

    A figure: mean, low, high (95 %; None with one value), n (repeats; for percentiles requests, for the score questions), unit,
    card, quantity.
    """
    check_comparable(rows)
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["arm"], row["workload"], row["phase"]), []).append(row)
    return [_summary(group) for group in groups.values()]


def _summary(group: Sequence[Row]) -> Row:
    first = group[0]
    failures = [f"Repeat {row['repeat']}: {row['failure']}" for row in group if row["failure"] is not None]
    return {
        "arm": first["arm"],
        "workload": first["workload"],
        "kind": first["kind"],
        "phase": first["phase"],
        "repeats": len(group),
        "failure": failures[0] if failures else None,
        "load": first["load"],
        "figures": {} if failures else _figures(group),
    }


def _figures(group: Sequence[Row]) -> dict[str, Row]:
    pooled = _pooled_percentiles(group) | _pooled_score(group)
    return {
        name: _estimate_row(pooled.get(name) or _over_repeats(group, name))
        | {key: figure[key] for key in ("unit", "card", "quantity")}
        for name, figure in group[0]["figures"].items()
    }


def _over_repeats(group: Sequence[Row], name: str) -> Estimate | None:
    """None when a repeat has no value: a mean of the others would be of other requests."""
    values = [row["figures"][name]["value"] for row in group]
    return None if None in values else mean(values)


def _pooled_percentiles(group: Sequence[Row]) -> dict[str, Estimate]:
    """Percentile figures by name, those of one metric resampled together."""
    wanted: dict[str, list[int]] = {}
    for name in group[0]["figures"]:
        if match := _PERCENTILE.fullmatch(name):
            wanted.setdefault(match[1], []).append(int(match[2]))
    found = {}
    for metric, qs in wanted.items():
        times = [value for row in group for value in row["per_request"][metric]]
        if times:
            found |= {f"{metric}_p{q}": estimate for q, estimate in zip(qs, percentiles(times, qs))}
    return found


def _pooled_score(group: Sequence[Row]) -> dict[str, Estimate]:
    """The score's interval is that of the questions asked, each the mean of its repeats: other questions would give another score."""
    right = [row["per_request"]["right"] for row in group]
    return {"task_score": mean(np.mean(right, axis=0))} if all(right) else {}


def _estimate_row(estimate: Estimate | None) -> Row:
    if estimate is None:
        return {"mean": None, "low": None, "high": None, "n": 0}
    return {"mean": estimate.value, "low": estimate.low, "high": estimate.high, "n": estimate.n}
