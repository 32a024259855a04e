"""From trials to figures and a verdict. Plain numbers: the verdict of a stored record is computed again from its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sgl_hq.gate.bounds import BOUNDS, Bound
from sgl_hq.page_format import STATED_PREFIX_TOKENS


@dataclass(frozen=True)
class Trial:
    """One format on one (window, prefix): maxima, minima and means over the steps. Logits and KL in nats, NLL per token.

    argmax_equal: share of the `argmax_judged` steps (dense margin above the noise floor) with the same best token;
    argmax_agreement: the same over all steps. Infinite where the packed arm's logits are not finite.
    """

    window: str
    prefix_tokens: int
    steps: int
    mse_max: float
    mse_mean: float
    variance_mse_max: float
    topk_min: float
    argmax_judged: int
    argmax_equal: float
    argmax_agreement: float
    rel_l2_max: float
    kl_max: float
    kl_mean: float
    nll_dense: float
    nll_packed: float
    stored_bits: float
    effective_bits: float

    @property
    def broken_bounds(self) -> tuple[Bound, ...]:
        return tuple(bound for bound in BOUNDS if not bound.holds(getattr(self, bound.figure)))

    @property
    def strict(self) -> bool:
        """Every step keeps every bound (a bound on a maximum or minimum over steps is a bound on every step)."""
        return not self.broken_bounds


def summarize(trials: Sequence[Trial]) -> dict[str, Any]:
    """The figures of one format over all its trials (at least one).

    `verdict` is "pass" only if every trial is strict. Means are over steps. Bits are means over the windows at the
    measured prefix nearest to STATED_PREFIX_TOKENS.
    """
    steps = sum(t.steps for t in trials)

    def mean(figure: str) -> float:
        return sum(getattr(t, figure) * t.steps for t in trials) / steps

    stated = min({t.prefix_tokens for t in trials}, key=lambda n: (abs(n - STATED_PREFIX_TOKENS), n))
    quoted = [t for t in trials if t.prefix_tokens == stated]
    judged = sum(t.argmax_judged for t in trials)
    strict = sum(t.strict for t in trials)
    return {
        "verdict": "pass" if strict == len(trials) else "fail",
        "strict_trials": strict,
        "trials": len(trials),
        "steps": steps,
        "mse_max": max(t.mse_max for t in trials),
        "mse_mean": mean("mse_mean"),
        "variance_mse_max": max(t.variance_mse_max for t in trials),
        "topk_min": min(t.topk_min for t in trials),
        "argmax_judged": judged,
        "argmax_equal": sum(t.argmax_equal * t.argmax_judged for t in trials) / judged if judged else 1.0,
        "argmax_agreement": mean("argmax_agreement"),
        "rel_l2_max": max(t.rel_l2_max for t in trials),
        "kl_max": max(t.kl_max for t in trials),
        "kl_mean": mean("kl_mean"),
        "ppl_change_percent": 100 * _expm1(mean("nll_packed") - mean("nll_dense")),
        "stored_bits": sum(t.stored_bits for t in quoted) / len(quoted),
        "effective_bits": sum(t.effective_bits for t in quoted) / len(quoted),
        "bits_at_prefix_tokens": stated,
    }


def failing_bounds(summary: dict[str, Any]) -> list[str]:
    """The broken bounds of a summary in words; empty for a pass."""
    return [bound.broken(summary[bound.figure]) for bound in BOUNDS if not bound.holds(summary[bound.figure])]


def _expm1(x: float) -> float:
    return math.expm1(x) if x < 700 else math.inf
