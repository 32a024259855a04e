"""A KV cache for timing: room for a whole batch is there from the start, and a decode step writes one token in place.

A cache that grows by concatenation would copy all of K and V at every step, outside attention, and falsify its share.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class SlotCache(Cache):
    """Every row is a copy of the same prefix in memory of its own. Decode steps always come after that prefix."""

    def __init__(self, prefix: Cache, batch: int) -> None:
        """prefix: a filled cache of one row, layers with `keys`, `values` `[1, H, T, D]`."""
        super().__init__(layers=[_SlotLayer(layer.keys, layer.values, batch) for layer in prefix.layers])


class _SlotLayer(CacheLayerMixin):
    """keys, values `[B, H, T + 1, D]`: T tokens of the prefix and the one that the step decodes."""

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, batch: int) -> None:
        super().__init__()
        self._prefix_tokens = keys.shape[2]
        self.keys, self.values = (_with_a_free_slot(side, batch) for side in (keys, values))
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the prefix was there first."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """key_states, value_states `[B, H, 1, D]`."""
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """The same before every step: a timed step changes nothing for the next one."""
        return self._prefix_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._prefix_tokens + query_length, 0

    def get_max_cache_shape(self) -> int:
        return -1


def _with_a_free_slot(side: torch.Tensor, batch: int) -> torch.Tensor:
    _, heads, tokens, dim = side.shape
    out = side.new_empty((batch, heads, tokens + 1, dim))
    out[:, :, :tokens] = side
    return out
