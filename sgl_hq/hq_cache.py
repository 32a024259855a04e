"""HQCache: a transformers cache that holds a prefix as packed pages and everything after it as bfloat16.

    cache = HQCache("hq7")                              # any page format of `sgl-hq formats`
    model(prefix_ids, past_key_values=cache)            # dense so far
    cache.pack()                                        # whole pages of 64 tokens become packed records
    model.generate(ids, past_key_values=copy.deepcopy(cache))   # many requests with this prefix; copies share the bytes

Nothing is packed until `pack()` is called, and a page is packed once: its values are never rounded a second time. Every
forward pass unpacks the prefix, so this saves memory between calls and reproduces what a server computes; it is not
faster. K and V are held as bfloat16 and returned in the dtype that the model computes in.
"""

from __future__ import annotations

import copy

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from sgl_hq.page_format import DEFAULT_LOSSY, PAGE_TOKENS, get_format
from sgl_hq.prefix_codec import PackedPrefix, PrefixCodec, ServedCodec


class HQCache(Cache):
    """For models whose layers all attend to the whole context. Rows of a batch must have equal length (no padding).

    fmt: the name of a page format (ValueError if unknown), or a PrefixCodec of one's own.
    """

    def __init__(self, fmt: str | PrefixCodec = DEFAULT_LOSSY) -> None:
        super().__init__(layers=[])
        self.codec: PrefixCodec = ServedCodec(get_format(fmt)) if isinstance(fmt, str) else fmt

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """key_states `[B, H, S, D]`, value_states `[B, H, S, Dv]`, K after RoPE: append them and return all of K and V."""
        while len(self.layers) <= layer_idx:
            self.layers.append(HQCacheLayer(self.codec, len(self.layers)))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def pack(self) -> int:
        """Pack every whole page that is dense now; returns the number of tokens packed so far, a multiple of 64.

        May be called again as the sequence grows. Raises ValueError then for a codec that needs the whole prefix at
        once (those of sgl_hq.baselines).
        """
        for layer in self.layers:
            layer.pack()
        return self.packed_tokens

    @property
    def packed_tokens(self) -> int:
        return self.layers[0].packed_tokens if self.layers else 0

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed prefix, all layers and rows."""
        return sum(packed.nbytes for layer in self.layers for row in layer.rows for packed in row)

    def __deepcopy__(self, memo: dict) -> HQCache:
        """Cheap: no tensor in here is ever written in place, so the copy shares them until it grows."""
        twin = copy.copy(self)
        twin.layers = [copy.copy(layer) for layer in self.layers]
        return twin


class HQCacheLayer(CacheLayerMixin):
    """One layer. rows: packed runs in order, for each row of the batch; keys, values: the dense rest
    `[B, H, tokens, D] bfloat16`."""

    is_sliding = False

    def __init__(self, codec: PrefixCodec, layer: int) -> None:
        super().__init__()
        self.codec, self.layer = codec, layer
        self.rows: tuple[tuple[PackedPrefix, ...], ...] = ()

    @property
    def packed_tokens(self) -> int:
        return sum(packed.tokens for packed in self.rows[0]) if self.rows else 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.device = key_states.device
        self.keys, self.values = (side[:, :, :0].bfloat16() for side in (key_states, value_states))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states.bfloat16()], -2)
        self.values = torch.cat([self.values, value_states.bfloat16()], -2)
        k, v = self.keys.to(key_states.dtype), self.values.to(value_states.dtype)
        if not self.rows:
            return k, v
        packed_k, packed_v = self._unpack()
        return torch.cat([packed_k.to(k.dtype), k], -2), torch.cat([packed_v.to(v.dtype), v], -2)

    def pack(self) -> None:
        tokens = self.keys.shape[-2] // PAGE_TOKENS * PAGE_TOKENS if self.is_initialized else 0
        if not tokens:
            return
        if self.rows and not isinstance(self.codec, ServedCodec):
            raise ValueError(f"{self.codec.name} needs the whole prefix at once: call pack() one time")
        later = {"begins_sequence": False} if self.rows else {}
        before = self.rows or ((),) * len(self.keys)
        heads = [side[:, :, :tokens].transpose(1, 2) for side in (self.keys, self.values)]
        self.rows = tuple(
            (*runs, self.codec.pack(self.layer, k, v, **later)) for runs, k, v in zip(before, *heads, strict=True)
        )
        # contiguous: a view would keep the packed tokens' dense memory alive
        self.keys, self.values = (side[:, :, tokens:].clone() for side in (self.keys, self.values))

    def get_seq_length(self) -> int:
        return self.packed_tokens + (self.keys.shape[-2] if self.is_initialized else 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_cache_shape(self) -> int:
        return -1

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` tokens, or drop the last `-max_length`. Only dense tokens can go."""
        length = self.get_seq_length() + max_length if max_length < 0 else max_length
        if length >= self.get_seq_length():
            return
        if length < self.packed_tokens:
            raise ValueError(f"cannot crop to {length} tokens: the first {self.packed_tokens} are packed")
        dense = length - self.packed_tokens
        self.keys, self.values = self.keys[:, :, :dense], self.values[:, :, :dense]

    def reset(self) -> None:
        self.rows, self.keys, self.values, self.is_initialized = (), None, None, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = (side[indices.to(side.device)] for side in (self.keys, self.values))
            self.rows = tuple(self.rows[int(i)] for i in indices) if self.rows else ()

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.keys, self.values = (side.repeat_interleave(repeats, 0) for side in (self.keys, self.values))
            self.rows = tuple(row for row in self.rows for _ in range(repeats))

    def _unpack(self) -> tuple[torch.Tensor, torch.Tensor]:
        """k `[B, H, packed_tokens, D]` and v, in the dtype of the codec."""
        rows = [[self.codec.unpack(self.layer, packed) for packed in row] for row in self.rows]
        return tuple(
            torch.stack([torch.cat([run[side] for run in row], 1) for row in rows]) for side in (0, 1)
        )
