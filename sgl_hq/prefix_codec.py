"""What the quality gate measures: a way to hold the K and V of a whole prefix in fewer bytes.

A served page format packs page by page (`ServedCodec`); formats of the literature may use statistics of the whole
prefix (`sgl_hq/baselines/`). Both are held as bytes, so that stored bits are counted and not modelled.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import torch

from sgl_hq.calibration.layer_formats import calibrated_codecs
from sgl_hq.calibration.store import read_calibration
from sgl_hq.kernels.page_codec import PageCodec, UnpackablePageError
from sgl_hq.page_format import PAGE_TOKENS, PageFormat, calibrated_bits


@dataclass(frozen=True)
class PackedPrefix:
    """K and V of one layer's prefix. tensors: everything needed to unpack, nothing else; tokens: its length.

    Never written again, so copies share the tensors.
    """

    tensors: tuple[torch.Tensor, ...]
    tokens: int

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def __deepcopy__(self, _: dict) -> PackedPrefix:
        return self


class PrefixCodec(Protocol):
    """Packs and unpacks one layer's prefix. `layer` matters only to formats whose widths differ by layer."""

    name: str

    def pack(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> PackedPrefix:
        """k `[T, H, D]`, v `[T, H, Dv]`, both bfloat16, K after RoPE, from the first token of the sequence on; T a
        positive multiple of 64."""
        ...

    def unpack(self, layer: int, packed: PackedPrefix) -> tuple[torch.Tensor, torch.Tensor]:
        """k `[H, T, D]`, v `[H, T, Dv]`, float32 (or bfloat16 if the format keeps every bit)."""
        ...

    def effective_bits_per_dim(self, head_dim: int, v_head_dim: int, prefix_tokens: int) -> float:
        """Modelled bits per value (formats.md): codes and metadata, no alignment. Averaged over layers."""
        ...


class ServedCodec:
    """A page format as the server uses it: page by page; a page that the codec refuses stays bfloat16.

    The server keeps all layers of a refused page dense, here only the layer concerned does: the packed rest is what
    the gate wants to see.
    """

    def __init__(self, fmt: PageFormat) -> None:
        self.fmt = fmt
        self.name = fmt.name

    def pack(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, *, begins_sequence: bool = True
    ) -> PackedPrefix:
        """As PrefixCodec.pack. begins_sequence: False for pages that follow ones packed before (they have no sinks)."""
        codec = self.page_codec(layer, k.shape[-1], v.shape[-1])
        k_pages, v_pages = (side.unflatten(0, (-1, PAGE_TOKENS)) for side in (k, v))
        try:
            records, sink = codec.pack(k_pages, v_pages, first_has_sink=begins_sequence)
            kept: list[int] = []
        except UnpackablePageError:
            records, sink, kept = _pack_one_by_one(codec, k_pages, v_pages, begins_sequence)
        if sink is None:
            sink = records.new_empty(0)
        kept_pages = torch.tensor(kept, dtype=torch.int32, device=k.device)
        return PackedPrefix((records, sink, kept_pages, k_pages[kept], v_pages[kept]), k.shape[0])

    def unpack(self, layer: int, packed: PackedPrefix) -> tuple[torch.Tensor, torch.Tensor]:
        records, sink, kept, k_kept, v_kept = packed.tensors
        codec = self.page_codec(layer, k_kept.shape[-1], v_kept.shape[-1])
        sides = codec.unpack(records, sink if sink.numel() else None)
        if not len(kept):
            return sides
        pages = packed.tokens // PAGE_TOKENS
        from_record = torch.ones(pages, dtype=torch.bool, device=records.device)
        from_record[kept] = False
        return tuple(
            _merge_pages(side, dense.permute(2, 0, 1, 3), from_record)
            for side, dense in zip(sides, (k_kept, v_kept), strict=True)
        )

    def effective_bits_per_dim(self, head_dim: int, v_head_dim: int, prefix_tokens: int) -> float:
        """Of the format; pages kept in bfloat16 do not enter."""
        return self.page_codec(0, head_dim, v_head_dim).layout.effective_bits_per_dim(prefix_tokens)

    def page_codec(self, layer: int, head_dim: int, v_head_dim: int) -> PageCodec:
        return _page_codec(self.fmt, head_dim, v_head_dim)


class CalibratedCodec(ServedCodec):
    """A calibrated format: a page codec of its own in every layer (layer_codecs.py)."""

    def __init__(self, name: str, calibration: Path | None, device: str = "cpu") -> None:
        """Raises CalibrationError without a usable calibration."""
        found = read_calibration(calibration)
        self.name = name
        self.calibration_digest = found.digest
        self._codecs = calibrated_codecs(name, calibrated_bits(name), found, device)

    def page_codec(self, layer: int, head_dim: int, v_head_dim: int) -> PageCodec:
        return self._codecs[layer]

    def effective_bits_per_dim(self, head_dim: int, v_head_dim: int, prefix_tokens: int) -> float:
        return sum(codec.layout.effective_bits_per_dim(prefix_tokens) for codec in self._codecs) / len(self._codecs)


@cache
def _page_codec(fmt: PageFormat, head_dim: int, v_head_dim: int) -> PageCodec:
    return PageCodec(fmt, head_dim, v_head_dim)


def _pack_one_by_one(
    codec: PageCodec, k: torch.Tensor, v: torch.Tensor, begins_sequence: bool
) -> tuple[torch.Tensor, torch.Tensor | None, list[int]]:
    """Records of the pages that can be packed, the sink if page 0 is one of them, and the indices of the others."""
    packed, kept, sink = [], [], None
    for page in range(len(k)):
        first = begins_sequence and page == 0
        try:
            record, page_sink = codec.pack(k[page : page + 1], v[page : page + 1], first_has_sink=first)
        except UnpackablePageError:
            kept.append(page)
            continue
        packed.append(record)
        sink = page_sink if first else sink
    none = torch.empty((0, k.shape[2], codec.layout.record_bytes), dtype=torch.uint8, device=k.device)
    return torch.cat([none, *packed]), sink, kept


def _merge_pages(unpacked: torch.Tensor, dense: torch.Tensor, from_record: torch.Tensor) -> torch.Tensor:
    """unpacked `[H, packed pages * 64, D]`, dense `[H, kept pages, 64, D]`, from_record `[P] bool` -> `[H, P * 64, D]`."""
    out = unpacked.new_empty((unpacked.shape[0], len(from_record), *dense.shape[2:]))
    out[:, from_record] = unpacked.unflatten(1, (unpacked.shape[1] // PAGE_TOKENS, PAGE_TOKENS))
    out[:, ~from_record] = dense.to(out.dtype)
    return out.flatten(1, 2)
