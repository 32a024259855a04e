"""From the share of a decode step that attention takes to the speed of the whole step. Plain arithmetic, no model.

Amdahl's law with a price: attention does the fraction f of its work, and the method costs h steps of its own,

    speedup = 1 / ((1 - p_attn) + p_attn * f + h)

It is a ceiling: f counts bytes or tokens as if attention's time were proportional to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sgl_hq.lab.errors import LabError
from sgl_hq.page_format import FORMATS, PAGE_TOKENS

# Stated before anything is measured: a method is worth building if, at an overhead of 5 % of a step, the step would be
# at least a tenth faster. Two servers that run the same code differ by about as much from run to run.
VERDICT_OVERHEAD = 0.05
WORTH_BUILDING = 1.10

OVERHEADS = (0.0, 0.02, VERDICT_OVERHEAD, 0.10)
ACTIVE_FRACTIONS = (0.125, 0.25, 0.337, 0.5, 0.75)
SHARERS = (2, 4, 16, 64)


def speedup(p_attn: float, active: float, overhead: float = 0.0) -> float:
    """Old step time / new step time. p_attn: 0 to 1; active: f, more than 0 only if attention does not vanish;
    overhead: h, in old steps. Infinite where nothing is left of the step."""
    if not 0 <= p_attn <= 1:
        raise LabError(f"attention cannot take {p_attn:g} of a step: give --p-attn between 0 and 1")
    if not 0 <= active <= 1:
        raise LabError(f"attention cannot do {active:g} of its work: give --active fractions between 0 and 1")
    if not 0 <= overhead:
        raise LabError(f"an overhead of {overhead:g} steps is no cost: give --overhead values of 0 or more")
    left = (1 - p_attn) + p_attn * active + overhead
    return 1 / left if left else float("inf")


def is_open(p_attn: float) -> bool:
    """Whether a method that makes attention vanish would be worth building."""
    return speedup(p_attn, 0.0, VERDICT_OVERHEAD) >= WORTH_BUILDING


@dataclass(frozen=True)
class Projection:
    """One method. kind: `limit`, `active`, `format` or `grouping`; active: f; speedups: one for each overhead."""

    kind: str
    name: str
    active: float
    speedups: tuple[float, ...]
    at_verdict: float

    @property
    def verdict(self) -> str:
        """`worth building` or `closed`, at VERDICT_OVERHEAD."""
        return "worth building" if self.at_verdict >= WORTH_BUILDING else "closed"


def project(
    p_attn: float,
    head_dim: int,
    context_tokens: int,
    actives: Sequence[float] = ACTIVE_FRACTIONS,
    overheads: Sequence[float] = OVERHEADS,
    batch: int | None = None,
) -> tuple[Projection, ...]:
    """The limit (attention takes no time at all), active fractions, page formats (f = stored bits / 16 for the whole pages of
    the context, 1 for its rest), grouping (f = 1 / sharers, no more of them than rows of the batch where that is known)."""
    packed_tokens = context_tokens // PAGE_TOKENS * PAGE_TOKENS

    def of(kind: str, name: str, active: float) -> Projection:
        speedups = tuple(speedup(p_attn, active, h) for h in overheads)
        return Projection(kind, name, active, speedups, speedup(p_attn, active, VERDICT_OVERHEAD))

    def every() -> Iterator[Projection]:
        yield of("limit", "no attention at all", 0.0)
        for active in actives:
            yield of("active", f"{active:g} of the tokens", active)
        for name, fmt in FORMATS.items() if packed_tokens else ():
            bits = fmt.layout(head_dim).stored_bits_per_value(packed_tokens)
            if bits < 16:
                yield of("format", f"{name}, {bits:.2f} bits", 1 - (1 - bits / 16) * packed_tokens / context_tokens)
        for sharers in (n for n in SHARERS if batch is None or n <= batch):
            yield of("grouping", f"{sharers} sharers", 1 / sharers)

    return tuple(every())
