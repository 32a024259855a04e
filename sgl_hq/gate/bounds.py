"""The gate's fixed numbers. Changing any of them, or a text, means another gate: raise GATE_VERSION.

Both arms compute in float32 with K and V rounded to bfloat16, so the bounds judge the format and not the arithmetic
(plain bfloat16 arithmetic itself fails the MSE bound once in 34 trials on SmolLM2-135M).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GATE_VERSION = 1
PREFIX_TOKENS = (512, 1024, 2048)
QUICK_PREFIX_TOKENS = (512, 1024)
STEPS = 32
TOP_K = 10

# A step's argmax is judged where the dense arm's best logit leads the second by more than this, in nats: closer than that,
# a server without any packing gives either token. Twice the rms change of this lead when the dense arm computes in bfloat16
# instead of float32: 0.101 on SmolLM2-135M (1,248 steps, all windows), 0.073 on Qwen2.5-Coder-0.5B (480 steps, core). The
# widest lead that bfloat16 arithmetic turned round was 0.176. A share of the logit's own size would not do: logits may all
# be shifted, and a best logit of 1.3 was turned at a lead of 0.018.
NOISE_FLOOR = 0.2


@dataclass(frozen=True)
class Bound:
    """One figure of a trial and its limit. `at_most`: the figure must not exceed the limit; else not fall below it."""

    figure: str  # attribute of figures.Trial, and key of a summary
    label: str
    limit: float
    at_most: bool

    def holds(self, value: float) -> bool:
        """False for NaN and infinity, too."""
        return math.isfinite(value) and (value <= self.limit if self.at_most else value >= self.limit)

    def broken(self, value: float) -> str:
        """What is wrong, in words: `logit MSE 2.54, at most 0.25 allowed`."""
        return f"{self.label} {value:.3g}, at {'most' if self.at_most else 'least'} {self.limit:g} allowed"


BOUNDS = (
    Bound("mse_max", "logit MSE", 0.25, at_most=True),
    Bound("topk_min", f"top-{TOP_K} overlap", 0.8, at_most=False),
    Bound("argmax_equal", "share of equal next tokens", 1.0, at_most=False),
    Bound("rel_l2_max", "relative L2 of the attention output", 0.10, at_most=True),
)
