"""How many bits every component gets: each next bit goes where it takes away the largest error per byte.

Greedy allocation is optimal here, because the error falls convexly with the bits (Shoham & Gersho 1988). Widths are given
to groups of 8 components and shared by the heads of a layer, so that a record has one layout per layer.
"""

from __future__ import annotations

import heapq

import torch

from sgl_hq.page_format import SPAN_CHANNELS

GROUP = SPAN_CHANNELS  # 8 components * 64 tokens * 1 bit = 64 bytes, a whole number of 16-byte fields
MIN_BITS, MAX_BITS = 2, 8


def allocate_widths(importance: torch.Tensor, mean_bits: float) -> torch.Tensor:
    """importance `[units, D / 8]` (cost of an error of one standard deviation) -> widths of the same shape, int64,
    `MIN_BITS` to `MAX_BITS`, with a mean of at most `mean_bits`. Raises ValueError if that is below MIN_BITS."""
    if mean_bits < MIN_BITS:
        raise ValueError(f"{mean_bits:.2f} bits a component cannot be reached: every component has at least {MIN_BITS}")
    costs = importance.flatten().tolist()
    widths = [MIN_BITS] * len(costs)
    spare = int(len(costs) * (mean_bits - MIN_BITS))
    queue = [(-_gain(cost, MIN_BITS), i) for i, cost in enumerate(costs)]
    heapq.heapify(queue)
    while spare and queue:
        _, i = heapq.heappop(queue)
        widths[i] += 1
        spare -= 1
        if widths[i] < MAX_BITS:
            heapq.heappush(queue, (-_gain(costs[i], widths[i]), i))
    return torch.tensor(widths).view(importance.shape)


def _gain(cost: float, bits: int) -> float:
    """What one more bit takes away: uniform codes over a fixed range have an error of range^2 / (12 * levels^2)."""
    return cost * (_error(bits) - _error(bits + 1))


def _error(bits: int) -> float:
    return 1.0 / (2**bits - 1) ** 2
