"""PageCodec: pages to records and back in PyTorch, on any device. The reference for kernels, and what the CPU host
runs.

Dimensions: P pages, 64 tokens a page, H kv heads, D = head_dim, Dv = v_head_dim. Not aware of pools, requests or
SGLang.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sgl_hq.page_format import PAGE_TOKENS, PageFormat, PageLayout

from .affine import pack_affine, unpack_affine
from .errors import MAX_MAGNITUDE, NonFiniteError
from .groups import step_ceil
from .lossless import pack_lossless, unpack_lossless
from .record import get, put
from .transform import Transform, pack_transformed, unpack_transformed

_INT8_LEVELS = 127


class PageCodec:
    """Packs and unpacks pages of one (format, head_dim, v_head_dim). Holds no tensors but `transform`.

    transform: the layer's bases, for kind transform (ValueError without) and for no other. out_dtype: what `unpack` gives: float32 if the format is lossy, else bfloat16.
    """

    def __init__(
        self, fmt: PageFormat, head_dim: int, v_head_dim: int | None = None, transform: Transform | None = None
    ) -> None:
        if (transform is not None) != (fmt.kind == "transform"):
            raise ValueError(f"format {fmt.name} of kind {fmt.kind}: kind transform needs a transform, others take none")
        self.fmt = fmt
        self.layout = fmt.layout(head_dim, v_head_dim)
        self.out_dtype = torch.float32 if fmt.lossy else torch.bfloat16
        self._pack_pages, self._unpack_pages = {
            "bf16": (_pack_bf16, _unpack_bf16),
            "lossless": (pack_lossless, unpack_lossless),
            "int8": (_pack_int8, _unpack_int8),
            "affine": (pack_affine, unpack_affine),
            "transform": (_bind(pack_transformed, transform), _bind(unpack_transformed, transform)),
        }[fmt.kind]

    def pack(
        self, k: torch.Tensor, v: torch.Tensor, *, first_has_sink: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Pack whole pages.

        Args:
            k: `[P, 64, H, D] bfloat16`, after RoPE. v: `[P, 64, H, Dv] bfloat16`, same device.
            first_has_sink: page 0 is the first page of a sequence. If the format keeps sinks, its first `sink_tokens`
                tokens are left out of the page's statistics (their codes are 0) and stored exactly in the sink slot.
        Returns:
            records `[P, H, record_bytes] uint8`, alignment gaps zero;
            sink `[H, sink_bytes] uint8`, or None without `first_has_sink` or in a format without sinks.
        Raises:
            ValueError: wrong shape, dtype or device. UnpackablePageError: values that the format cannot hold
            (errors.py; sink tokens may hold anything).
        """
        pages, heads = self._check_dense(k, v)
        sink_tokens = self.fmt.sink_tokens if first_has_sink else 0
        if sink_tokens and not pages:
            raise ValueError("first_has_sink is set, but there is no page to take sink tokens from (P = 0)")
        sink = None
        if sink_tokens:
            sink = self._pack_sink(k, v)
            k, v = k.clone(), v.clone()
            for side in (k, v):  # a copy of the first packed token adds nothing to any minimum or maximum
                side[0, :sink_tokens] = side[0, sink_tokens]
        if self.fmt.lossy:
            _check_magnitude(k, v)
        records = torch.zeros((pages, heads, self.layout.record_bytes), dtype=torch.uint8, device=k.device)
        if pages and heads:
            sinks = {"sink_tokens": sink_tokens} if sink_tokens else {}  # known to the kinds with sinks only
            self._pack_pages(self.layout, records, k.transpose(1, 2), v.transpose(1, 2), **sinks)
        return records, sink

    def unpack(
        self,
        records: torch.Tensor,
        sink: torch.Tensor | None = None,
        *,
        out: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Unpack pages to head-major K and V, V in its original space.

        Args:
            records: `[P, H, record_bytes] uint8` in the order of the sequence. sink: `[H, sink_bytes] uint8` of the
                sequence that page 0 begins: the first `sink_tokens` tokens become its exact values.
            out: (k, v) to fill and return, contiguous, of the shapes and dtype below. On a CPU this saves the page
                faults of fresh memory.
        Returns:
            k `[H, P * 64, D]`, v `[H, P * 64, Dv]`, contiguous, of `out_dtype`.
        Raises:
            ValueError: wrong shape, dtype or device, or a sink for a format without sinks.
        """
        pages, heads = self._check_records(records, sink)
        shapes = [(heads, pages * PAGE_TOKENS, dim) for dim in (self.layout.head_dim, self.layout.v_head_dim)]
        if out is None:
            k, v = (torch.empty(shape, dtype=self.out_dtype, device=records.device) for shape in shapes)
        else:
            k, v = out
            _check_out(out, shapes, self.out_dtype, records.device)
        if pages and heads:
            by_page = [side.unflatten(1, (pages, PAGE_TOKENS)) for side in (k, v)]
            self._unpack_pages(self.layout, _word_aligned(records).transpose(0, 1), *by_page)
        if sink is not None:
            for side, field in zip((k, v), self.layout.sink_fields, strict=True):
                exact = sink[:, field.offset : field.end].contiguous().view(torch.bfloat16)
                side[:, : self.fmt.sink_tokens] = exact.unflatten(-1, (self.fmt.sink_tokens, -1))
        return k, v

    def _pack_sink(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """`[H, sink_bytes] uint8` of the first tokens of page 0."""
        sink = torch.zeros((k.shape[2], self.layout.sink_bytes), dtype=torch.uint8, device=k.device)
        for side, field in zip((k, v), self.layout.sink_fields, strict=True):
            exact = side[0, : self.fmt.sink_tokens].transpose(0, 1).contiguous()
            sink[:, field.offset : field.end] = exact.flatten(1).view(torch.uint8)
        return sink

    def _check_dense(self, k: torch.Tensor, v: torch.Tensor) -> tuple[int, int]:
        for name, side, dim in (("k", k, self.layout.head_dim), ("v", v, self.layout.v_head_dim)):
            if side.dim() != 4 or side.shape[1] != PAGE_TOKENS or side.shape[3] != dim:
                raise ValueError(
                    f"{name} has shape {list(side.shape)}; a page codec packs [P, {PAGE_TOKENS}, H, {dim}]"
                )
            if side.dtype != torch.bfloat16:
                raise ValueError(f"{name} is {side.dtype}; pages are packed from torch.bfloat16")
        if k.shape[:3] != v.shape[:3]:
            raise ValueError(f"k {list(k.shape)} and v {list(v.shape)} differ in pages or heads")
        if k.device != v.device:
            raise ValueError(f"k is on {k.device} and v on {v.device}; they must share a device")
        return k.shape[0], k.shape[2]

    def _check_records(self, records: torch.Tensor, sink: torch.Tensor | None) -> tuple[int, int]:
        record_bytes = self.layout.record_bytes
        if records.dim() != 3 or records.shape[2] != record_bytes or records.dtype != torch.uint8:
            raise ValueError(
                f"records are {list(records.shape)} {records.dtype}; "
                f"format {self.fmt.name} has [P, H, {record_bytes}] torch.uint8"
            )
        pages, heads = records.shape[:2]
        if sink is None:
            return pages, heads
        if not self.fmt.sink_tokens:
            raise ValueError(f"a sink was given, but format {self.fmt.name} keeps no sink tokens")
        if not pages:
            raise ValueError("a sink was given, but there is no page it could begin (P = 0)")
        expected = [heads, self.layout.sink_bytes]
        if list(sink.shape) != expected or sink.dtype != torch.uint8 or sink.device != records.device:
            raise ValueError(
                f"sink is {list(sink.shape)} {sink.dtype} on {sink.device}; "
                f"expected {expected} torch.uint8 on {records.device}"
            )
        return pages, heads


def _bind(function: Callable[..., None], transform: Transform | None) -> Callable[..., None]:
    return lambda layout, *tensors, **sinks: function(layout, transform, *tensors, **sinks)


# Records are `[P, H, record_bytes]`, k `[P, H, 64, D]` and v `[P, H, 64, Dv]` when packing; records
# `[H, P, record_bytes]`, k `[H, P, 64, D]` and v `[H, P, 64, Dv]`, contiguous and to be filled, when unpacking.


def _pack_bf16(layout: PageLayout, records: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    put(records, layout["k"], k)
    put(records, layout["v"], v)


def _unpack_bf16(layout: PageLayout, records: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    for name, out in (("k", k), ("v", v)):  # as integers: no NaN can be touched
        out.view(torch.int16).flatten(2).copy_(get(records, layout[name], torch.int16))


def _pack_int8(layout: PageLayout, records: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    for side, values in (("k", k.float()), ("v", v.float())):
        scale = step_ceil(values.abs().amax(-1).double() / _INT8_LEVELS)
        steps = values / torch.where(scale > 0, scale, torch.ones_like(scale)).float().unsqueeze(-1)
        put(records, layout[f"{side}_codes"], steps.round_().clamp_(-_INT8_LEVELS, _INT8_LEVELS).to(torch.int8))
        put(records, layout[f"{side}_scale"], scale)


def _unpack_int8(layout: PageLayout, records: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    for side, out in (("k", k), ("v", v)):
        out.flatten(2).copy_(get(records, layout[f"{side}_codes"], torch.int8))
        out *= get(records, layout[f"{side}_scale"], torch.bfloat16).float().unsqueeze(-1)


def _check_magnitude(k: torch.Tensor, v: torch.Tensor) -> None:
    for name, side in (("k", k), ("v", v)):
        if side.numel() and not side.abs().amax() <= MAX_MAGNITUDE:  # a NaN compares false
            raise NonFiniteError(
                f"{name} holds NaN, infinity or a magnitude above 2**112; "
                "a lossy format cannot pack it: keep these pages dense"
            )


def _check_out(
    out: tuple[torch.Tensor, torch.Tensor], shapes: list[tuple[int, int, int]], dtype: torch.dtype, device: torch.device
) -> None:
    for name, side, shape in zip(("k", "v"), out, shapes, strict=True):
        if tuple(side.shape) != shape or side.dtype != dtype or side.device != device or not side.is_contiguous():
            raise ValueError(
                f"out {name} is {list(side.shape)} {side.dtype} on {side.device}; "
                f"expected contiguous {list(shape)} {dtype} on {device}"
            )


def _word_aligned(records: torch.Tensor) -> torch.Tensor:
    """`records`, copied only where its bytes cannot be read as int64 words in place."""
    in_place = records.stride(2) == 1 and all(n % 8 == 0 for n in (records.storage_offset(), *records.stride()[:2]))
    return records if in_place else records.clone(memory_format=torch.contiguous_format)
