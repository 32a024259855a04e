"""The cases of `sgl-hq bench kernels`: their sizes, what must move and be computed, and the goals. Plain arithmetic.

A case is one layer's decode step: every request has one query token and attends to a prefix, in whole pages and shared
by the requests of a group or its own, and to private tokens that stay bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

from sgl_hq.page_format import BF16_BYTES, PAGE_TOKENS, PageLayout

READ_TB_S, BF16_TFLOP_S = 4.35, 790.0  # measured on an H200: reading memory, bfloat16 tensor cores


@dataclass(frozen=True)
class Case:
    """`requests` rows in `prefixes` groups of equal size; `prefix_tokens` and `private_tokens` of each request."""

    name: str
    requests: int
    prefixes: int
    prefix_tokens: int
    private_tokens: int
    q_heads: int = 28
    kv_heads: int = 4
    head_dim: int = 128

    def __post_init__(self) -> None:
        if self.requests % self.prefixes or self.prefix_tokens % PAGE_TOKENS or self.private_tokens % PAGE_TOKENS:
            raise ValueError(f"case {self.name}: groups must have equal sizes, prefix and private tokens must be whole pages")

    @property
    def rows_per_prefix(self) -> int:
        return self.requests // self.prefixes

    @property
    def prefix_pages(self) -> int:
        """Pages of one prefix."""
        return self.prefix_tokens // PAGE_TOKENS

    @property
    def private_pages(self) -> int:
        """Pages of one request's private tokens."""
        return self.private_tokens // PAGE_TOKENS

    @property
    def io_bytes(self) -> int:
        """Queries read and outputs written, bfloat16."""
        return 2 * self.requests * self.q_heads * self.head_dim * BF16_BYTES

    @property
    def private_bytes(self) -> int:
        """K and V of all private tokens, bfloat16."""
        return self.requests * self.private_tokens * self.kv_heads * 2 * self.head_dim * BF16_BYTES

    def dense_bytes(self, value_bytes: int) -> int:
        """What a step on dense KV must move if every stored token is read once; 2 bytes a value for bfloat16, 1 for FP8."""
        tokens = self.prefixes * self.prefix_tokens + self.requests * self.private_tokens
        return tokens * self.kv_heads * 2 * self.head_dim * value_bytes + self.io_bytes

    def record_bytes(self, layout: PageLayout) -> int:
        """The packed prefixes: records, and the sink slot of each."""
        return self.prefixes * self.kv_heads * (self.prefix_pages * layout.record_bytes + layout.sink_bytes)

    def packed_bytes(self, layout: PageLayout) -> int:
        """What a step on packed prefixes and dense private tokens must move; partial results are not counted."""
        return self.record_bytes(layout) + self.private_bytes + self.io_bytes

    def flops(self, tokens: int) -> int:
        """Both products of attention over `tokens` of every request: 2 operations per multiply-add; rotations not counted."""
        return 4 * self.requests * self.q_heads * self.head_dim * tokens


CASES = {
    case.name: case
    for case in (
        Case("A", 64, 4, 8192, 384),
        Case("B", 64, 64, 8192, 384),
        Case("C", 256, 1, 8192, 256),
        Case("D", 16, 16, 32000, 384),
    )
}  # fmt: skip
_EVERY = "every format"
# Microseconds a layer, merge included: (goal, stretch goal or None).
_GOALS: dict[str, dict[str, tuple[float, float | None]]] = {
    "A": {_EVERY: (45, 35)},
    "B": {"hq4": (120, 95), "hq6": (150, None), "int8": (175, None), "lossless": (240, None)},
    "C": {_EVERY: (95, 70)},
    "D": {"hq4": (115, None), "hq6": (145, None)},
}


def goal_us(case: str, fmt: str) -> tuple[float, float | None] | None:
    """(goal, stretch goal) of a format on a case, or None where none was set."""
    goals = _GOALS.get(case, {})
    return goals.get(fmt, goals.get(_EVERY))


def verdict(case: str, fmt: str, microseconds: float) -> str:
    """`stretch`, `met`, `missed`, or `-` where no goal was set."""
    goal = goal_us(case, fmt)
    if goal is None:
        return "-"
    reached, stretch = goal
    if stretch is not None and microseconds <= stretch:
        return "stretch"
    return "met" if microseconds <= reached else "missed"


def floor_us(moved_bytes: int, flops: int) -> float:
    """The least time: the slower of reading all bytes and computing all operations, each at the rate measured alone."""
    return max(moved_bytes / READ_TB_S / 1e6, flops / BF16_TFLOP_S / 1e6)


def parse_cases(text: str) -> list[Case]:
    """Comma-separated case names. Raises ValueError that names the unknown one and the known ones."""
    names = [name.strip().upper() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in CASES]
    if unknown or not names:
        raise ValueError(f"unknown case {', '.join(unknown) or '(none)'}: choose from {', '.join(CASES)}")
    return [CASES[name] for name in names]
