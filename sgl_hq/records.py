"""What crosses the borders between cache, pool and attention. Plain data, no sglang."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Segment:
    """Packed pages of one radix node, in sequence order. `node_id` is unique for the life of the tree."""

    node_id: int
    pages: tuple[int, ...]


@dataclass(frozen=True)
class PackedRun:
    """The leading packed part of one running request: segments from the root down.

    tokens: length of the run; the request's tokens from this position on are dense.
    """

    segments: tuple[Segment, ...]
    tokens: int


EMPTY_RUN = PackedRun((), 0)


@dataclass(frozen=True)
class Group:
    """Packed pages that the same rows read, in sequence order. rows: indices into the batch, ascending."""

    pages: tuple[int, ...]
    rows: tuple[int, ...]


class AttnState(NamedTuple):
    """Softmax attention over part of a sequence; `attention/merge.py` joins states of disjoint parts.

    o: [rows, q_heads, v_head_dim] float32, normalised; lse_nat: [rows, q_heads] float32, natural log of the sum of
    exponentiated scaled scores (FlashInfer's are base 2), -inf for a part without tokens.
    """

    o: torch.Tensor
    lse_nat: torch.Tensor
