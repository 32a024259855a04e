"""From steps to verdicts. A row is one selector at one step; only all rows together say something about the selector.

The bounds are those of the quality gate, step by step. A row that keeps them is evidence of one step: the
implementation verdict is `pass` only if every step of every text keeps every bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sgl_hq.gate.bounds import BOUNDS

PASS, FAIL = "pass", "fail"


@dataclass(frozen=True)
class StepRow:
    """topk: share of the ten best tokens that both arms have; argmax_equal matters only where argmax_judged (the dense lead
    exceeds the gate's noise floor); mse, kl in nats; infinite where the selected arm's logits are not finite."""

    selector: str
    text: str
    step: int
    context_tokens: int
    mse: float
    topk: float
    argmax_equal: bool
    argmax_judged: bool
    rel_l2: float
    kl: float
    kept_fraction: float
    read_fraction: float

    @property
    def keeps_bounds(self) -> bool:
        found = {
            "mse_max": self.mse,
            "topk_min": self.topk,
            "argmax_equal": float(self.argmax_equal or not self.argmax_judged),
            "rel_l2_max": self.rel_l2,
        }
        return all(bound.holds(found[bound.figure]) for bound in BOUNDS)


def summarize_selector(rows: Sequence[StepRow]) -> dict[str, Any]:
    """Of one selector, at least one row. Fractions and KL are means over the rows, the others the worst row."""

    def mean(figure: str) -> float:
        return sum(getattr(row, figure) for row in rows) / len(rows)

    kept = sum(row.keeps_bounds for row in rows)
    return {
        "selector": rows[0].selector,
        "implementation_verdict": PASS if kept == len(rows) else FAIL,
        "rows_within_bounds": kept,
        "rows": len(rows),
        "kept_fraction": mean("kept_fraction"),
        "read_fraction": mean("read_fraction"),
        "mse_max": max(row.mse for row in rows),
        "topk_min": min(row.topk for row in rows),
        "argmax_changed": sum(row.argmax_judged and not row.argmax_equal for row in rows),
        "argmax_judged": sum(row.argmax_judged for row in rows),
        "rel_l2_max": max(row.rel_l2 for row in rows),
        "kl_mean": mean("kl"),
    }
