"""The lab's rule applied to its rows: a ceiling and an oracle of the same model and context, or no decision.

A ceiling may come from another machine than the oracle: times depend on the machine, answers do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sgl_hq.lab.oracle_rows import PASS
from sgl_hq.lab.projection import VERDICT_OVERHEAD, WORTH_BUILDING, speedup

Result = dict[str, Any]
BUILD, LOOK, CLOSED = "worth building", "worth looking for", "closed"


@dataclass(frozen=True)
class Decision:
    """One selector on one model and context. speeds: of a step at VERDICT_OVERHEAD if attention reads only what the selector
    reads, one for each of the target's ceilings.

    conclusion: `worth building` if every step keeps the bounds and a ceiling reaches the threshold; `worth looking for` if that holds for an
    oracle, which cannot be built itself; else `closed`, for its answers or for its speed.
    """

    selector: str
    oracle: bool
    verdict: str
    read_fraction: float
    speeds: tuple[float, ...]

    @property
    def conclusion(self) -> str:
        if self.verdict != PASS or max(self.speeds) < WORTH_BUILDING:
            return CLOSED
        return LOOK if self.oracle else BUILD


def joined(oracles: Sequence[Result]) -> list[Result]:
    """Runs over the same steps of the same model on the same device as one, with the selectors of all of them."""
    targets: dict[tuple, Result] = {}
    for result in oracles:
        key = result["model"], result["context_tokens"], result["steps"], tuple(result["texts"]), device(result)
        before = targets.get(key, result | {"selectors": []})
        targets[key] = before | {"selectors": [*before["selectors"], *result["selectors"]]}
    return list(targets.values())


def ceilings_of(oracle: Result, ceilings: Sequence[Result]) -> list[Result]:
    return [c for c in ceilings if all(c[key] == oracle[key] for key in ("model", "context_tokens"))]


def decide(oracle: Result, ceilings: Sequence[Result]) -> list[Decision]:
    """One for each selector of `oracle`; none without a ceiling on its target."""
    shares = [ceiling["p_attn"] for ceiling in ceilings_of(oracle, ceilings)]
    if not shares:
        return []
    return [
        Decision(
            s["selector"], s["oracle"], s["implementation_verdict"], s["read_fraction"],
            tuple(speedup(p_attn, min(1.0, s["read_fraction"]), VERDICT_OVERHEAD) for p_attn in shares),
        )
        for s in oracle["selectors"]
    ]  # fmt: skip


def device(result: Result) -> str:
    """`cpu`, or a GPU's name."""
    return result.get("gpu", result["device"])


def where(ceiling: Result) -> str:
    """`cpu, batch 16`, or a GPU's name in place of cpu."""
    return f"{device(ceiling)}, batch {ceiling['batch']}"
