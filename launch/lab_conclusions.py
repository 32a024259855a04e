"""The sentences of docs/lab.md that state figures, made of the same rows as its tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import Any

from sgl_hq.lab.oracle_rows import PASS
from sgl_hq.launch.lab_decisions import BUILD, LOOK, Decision, Result, ceilings_of, decide, device, where

_LIMIT = "no attention at all"


def of_target(oracle: Result, ceilings: Sequence[Result]) -> str:
    """What is open and what is closed for one model and context: a list item of one paragraph."""
    head = f"**{oracle['model']}, {oracle['context_tokens']:,} tokens, {oracle['selectors'][0]['rows']} steps on {device(oracle)}.**"
    here = ceilings_of(oracle, ceilings)
    sentences = (_limits(here), *_grouping(here), *_answers(oracle["selectors"]), *_next(decide(oracle, ceilings)))
    return f"- {head} {' '.join(sentences)}"


def _limits(ceilings: Sequence[Result]) -> str:
    if not ceilings:
        return "No ceiling is measured on this target."
    parts = (f"{c['p_attn']:.0%} of a step on {where(c)} (at most {_at_verdict(c, _LIMIT):.2f} times the speed)" for c in ceilings)
    return f"Attention takes {', '.join(parts)}."


def _grouping(ceilings: Sequence[Result]) -> Iterator[str]:
    """The largest group of every batch: it attends to the same K and V, so answers are not the question."""
    for ceiling in ceilings:
        groups = [row for row in ceiling["rows"] if row["kind"] == "grouping"]
        if groups:
            yield f"Grouping, {groups[-1]['name']} on {where(ceiling)}: at most {groups[-1]['at_verdict']:.2f} times, with every bit kept."


def _answers(selectors: Sequence[dict[str, Any]]) -> Iterator[str]:
    for oracle, kind, kinds in ((True, "oracle", "oracles"), (False, "selector that can be built", "selectors that can be built")):
        of_kind = [s for s in selectors if s["oracle"] is oracle]
        if not of_kind:
            continue
        passed = [s for s in of_kind if s["implementation_verdict"] == PASS]
        if passed:
            named = (f"`{s['selector']}` (worst logit MSE {s['mse_max']:.3f})" for s in passed)
            yield f"Every bound at every step is kept by {len(passed)} of {len(of_kind)} {kinds}: {', '.join(named)}."
        else:
            best = max(of_kind, key=lambda s: s["rows_within_bounds"])
            yield f"No {kind} keeps every bound; the nearest is `{best['selector']}`, {best['rows_within_bounds']} of {best['rows']} steps."


def _next(decisions: Sequence[Decision]) -> Iterator[str]:
    if not decisions:
        return
    build, look = ([d for d in decisions if d.conclusion == kind] for kind in (BUILD, LOOK))
    if build:
        yield f"Worth building: {', '.join(map(_named, build))}."
    if look and not build:
        least = max(look, key=lambda d: max(d.speeds))
        yield f"Worth looking for: a selector that can be built and comes near {_named(least)}."
    if not build and not look:
        slow = [d for d in decisions if d.verdict == PASS]
        yield f"Closed: what keeps the bounds would reach {max(max(d.speeds) for d in slow):.2f} times the speed at most." if slow else "Closed."


def _named(decision: Decision) -> str:
    return f"`{decision.selector}` (at most {max(decision.speeds):.2f} times the speed)"


def of_frontier(result: Result) -> str:
    """Which format is the smallest in bounds, and where each cosine ranks formats the wrong way round."""
    rows = result["rows"]
    within = [row for row in rows if row["strict_trials"] == row["trials"]]
    smallest = "No format keeps every bound"
    if within:
        smallest = f"Smallest format with all trials within bounds: `{within[0]['format']}` ({within[0]['stored_bits']:.2f} bits)"
    parts = [smallest, *(_misled(rows, key, label) for key, label in (("score_cos_mean", "score cosine"), ("output_cos_mean", "output cosine")))]
    return f"- **{result['model']}, frontier.** {'; '.join(parts)}."


def _misled(rows: Sequence[dict[str, Any]], figure: str, label: str) -> str:
    """The worst pair: of two formats the one with the larger cosine has this much more mean logit MSE."""
    lossy = [row for row in rows if _mse(row) > 0]
    pairs = [(_mse(a) / _mse(b), a, b) for a, b in permutations(lossy, 2) if a[figure] >= b[figure] and _mse(b) < min(_mse(a), math.inf)]
    if not pairs:
        return f"the {label} ranks them as the mean logit MSE does"
    ratio, a, b = max(pairs, key=lambda pair: pair[0])
    preferred, better = (f"`{row['format']}` ({row[figure]:.4f})" for row in (a, b))
    return f"the {label} prefers {preferred} to {better}, which has {ratio:.1f} times less mean logit MSE"


def _mse(row: dict[str, Any]) -> float:
    """Figures that are not finite are null in JSON."""
    return math.inf if row["mse_mean"] is None else row["mse_mean"]


def _at_verdict(ceiling: Result, name: str) -> float:
    return next(row["at_verdict"] for row in ceiling["rows"] if row["name"].split(",")[0] == name)
