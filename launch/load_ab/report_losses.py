"""Where each arm of ours is worse than the best of the other arms, in words."""

from __future__ import annotations

import math
from typing import NamedTuple

from sgl_hq.launch.load_ab.report_cells import CARDS, Column
from sgl_hq.launch.load_ab.result_view import Case, ResultView, Row

MARGIN = 0.005  # a smaller relative difference reads as 1.00 times


class Loss(NamedTuple):
    """One figure of one case. `ratio`: mine / theirs, infinite where theirs is 0. `overlap`: None where an interval is missing."""

    case: Case
    other: str
    mine: float
    theirs: float
    ratio: float
    overlap: bool | None


def loss_sentences(view: ResultView) -> list[str]:
    """One for each arm of ours; it says so where the arm failed or loses nowhere."""
    others = [arm for arm in view.arms if arm not in view.ours]
    if not others:
        return ["No arm without this project's plugin was measured: there is nothing to lose against."]
    return [_sentence(view, arm, others) for arm in view.ours]


def losses(view: ResultView, arm: str, others: list[str], column: Column) -> tuple[list[Loss], int]:
    """Cases in which the best of `others` is better by more than MARGIN, and the count of cases compared."""
    found, compared = [], 0
    for case in view.cases:
        mine = view.figure(arm, case, column.figure)
        theirs = {other: figure for other in others if (figure := view.figure(other, case, column.figure))}
        if not column.better or mine is None or not theirs:
            continue
        compared += 1
        other = max(theirs, key=lambda name: column.better * theirs[name]["mean"])
        best = theirs[other]["mean"]
        if column.better * (best - mine["mean"]) > MARGIN * abs(best):
            ratio = mine["mean"] / best if best else math.inf
            found.append(Loss(case, other, mine["mean"], best, ratio, _overlap(mine, theirs[other])))
    return found, compared


def _sentence(view: ResultView, arm: str, others: list[str]) -> str:
    failed = [", ".join(case) for case in view.cases if view.failure(arm, case)]
    if len(failed) == len(view.cases):
        return f"{arm} failed everywhere."
    parts = [part for card in CARDS for column in card.columns if (part := _part(column, *losses(view, arm, others, column)))]
    nowhere = f"{arm} is nowhere worse than the best other arm by more than {MARGIN:.1%}."
    text = f"{arm} is worse than the best other arm in {'; '.join(parts)}." if parts else nowhere
    return text + (f" It failed in {'; '.join(failed)}." if failed else "")


def _part(column: Column, found: list[Loss], compared: int) -> str:
    """"TTFT p50 (4 of 6 cases, at worst 1.11 times vanilla's in shared, warm; intervals overlap in 1)"; empty without a loss."""
    if not found:
        return ""
    worst = max(found, key=lambda loss: -column.better * loss.ratio)
    mine, theirs = (f"{value / column.scale:,.{column.digits}f}" for value in (worst.mine, worst.theirs))
    distance = f"{worst.ratio:.2f} times {worst.other}'s" if worst.theirs else f"{mine} against {worst.other}'s {theirs}"
    text = f"{column.name} ({len(found)} of {compared} cases, at worst {distance} in {', '.join(worst.case)}"
    overlapping = sum(bool(loss.overlap) for loss in found)
    unknown = sum(loss.overlap is None for loss in found)
    text += f"; intervals overlap in {overlapping}" if overlapping else ""
    return text + (f"; no interval in {unknown})" if unknown else ")")


def _overlap(one: Row, other: Row) -> bool | None:
    if one["low"] is None or other["low"] is None:
        return None
    return one["low"] <= other["high"] and other["low"] <= one["high"]
