"""PageCodec: pages to records and back in PyTorch, on any device. The reference for kernels, and what the CPU host
runs.

Dimensions: P pages, 64 tokens a page, H kv heads, D = head_dim, Dv = v_head_dim. Not aware of pools, requests or
SGLang.
"""

from __future__ import annotations

import torch

from sgl_hq.page_format import PAGE_TOKENS, PageFormat, plane_widths

from .bitplanes import pack_planes, unpack_planes
from .groups import Groups, encode, fit_groups, step_ceil
from .hadamard import rotate, unrotate

MAX_MAGNITUDE = 2.0**112  # about 5e33: spans and sums over head_dim stay far inside float32 and bfloat16
_INT8_LEVELS = 127
_TILE_TOKENS = (
    2048  # V tokens rotated at a time: 0.5 MiB of float32 codes at 64 channels, so a tile stays in a core's L2
)


class NonFiniteError(ValueError):
    """A lossy format cannot hold these pages: NaN, infinity, or a magnitude above MAX_MAGNITUDE. Keep them dense."""


class PageCodec:
    """Packs and unpacks pages of one (format, head_dim, v_head_dim). Holds no tensors."""

    def __init__(self, fmt: PageFormat, head_dim: int, v_head_dim: int | None = None) -> None:
        self.fmt = fmt
        self.layout = fmt.layout(head_dim, v_head_dim)
        self._pack_pages, self._unpack_pages = {
            "bf16": (self._pack_bf16, self._unpack_bf16),
            "int8": (self._pack_int8, self._unpack_int8),
            "affine": (self._pack_affine, self._unpack_affine),
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
            ValueError: wrong shape, dtype or device. NonFiniteError: see there (sink tokens may hold anything; bf16
            pages too).
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
        if self.fmt.kind != "bf16":
            _check_magnitude(k, v)
        records = torch.zeros((pages, heads, self.layout.record_bytes), dtype=torch.uint8, device=k.device)
        if pages and heads:
            self._pack_pages(records, k.transpose(1, 2), v.transpose(1, 2), sink_tokens)
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
            k `[H, P * 64, D]`, v `[H, P * 64, Dv]`, contiguous; bfloat16 for kind bf16 (every bit kept), else float32.
        Raises:
            ValueError: wrong shape, dtype or device, or a sink for a format without sinks.
        """
        pages, heads = self._check_records(records, sink)
        dtype = torch.bfloat16 if self.fmt.kind == "bf16" else torch.float32
        shapes = [(heads, pages * PAGE_TOKENS, dim) for dim in (self.layout.head_dim, self.layout.v_head_dim)]
        if out is None:
            k, v = (torch.empty(shape, dtype=dtype, device=records.device) for shape in shapes)
        else:
            k, v = out
            _check_out(out, shapes, dtype, records.device)
        if pages and heads:
            by_page = [side.unflatten(1, (pages, PAGE_TOKENS)) for side in (k, v)]
            self._unpack_pages(_word_aligned(records).transpose(0, 1), *by_page)
        if sink is not None:
            for side, field in zip((k, v), self.layout.sink_fields, strict=True):
                exact = sink[:, field.offset : field.end].contiguous().view(torch.bfloat16)
                side[:, : self.fmt.sink_tokens] = exact.unflatten(-1, (self.fmt.sink_tokens, -1))
        return k, v

    # In all methods below: records `[P, H, record_bytes]` when packing, `[H, P, record_bytes]` when unpacking;
    # k `[P, H, 64, D]`, v `[P, H, 64, Dv]` when packing; k `[H, P, 64, D]`, v `[H, P, 64, Dv]`, to be filled, when
    # unpacking.

    def _pack_bf16(self, records: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink_tokens: int) -> None:
        self._put(records, "k", k)
        self._put(records, "v", v)

    def _unpack_bf16(self, records: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        for name, out in (("k", k), ("v", v)):  # as integers: no NaN can be touched
            out.view(torch.int16).flatten(2).copy_(self._get(records, name, torch.int16))

    def _pack_int8(self, records: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink_tokens: int) -> None:
        for side, values in (("k", k.float()), ("v", v.float())):
            scale = step_ceil(values.abs().amax(-1).double() / _INT8_LEVELS)
            steps = values / torch.where(scale > 0, scale, torch.ones_like(scale)).float().unsqueeze(-1)
            self._put(records, f"{side}_codes", steps.round_().clamp_(-_INT8_LEVELS, _INT8_LEVELS).to(torch.int8))
            self._put(records, f"{side}_scale", scale)

    def _unpack_int8(self, records: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        for side, out in (("k", k), ("v", v)):
            out.flatten(2).copy_(self._get(records, f"{side}_codes", torch.int8))
            out *= self._get(records, f"{side}_scale", torch.bfloat16).float().unsqueeze(-1)

    def _pack_affine(self, records: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink_tokens: int) -> None:
        over_tokens, over_channels = 2, 3
        sides = (("k", k.float(), self.fmt.k_bits, over_tokens), ("v", rotate(v), self.fmt.v_bits, over_channels))
        ranges = []
        for side, values, bits, over in sides:
            levels = 2**bits - 1
            groups = fit_groups(values.amin(over), values.amax(over), levels)
            scale, minimum = groups.decode()
            codes = encode(values, scale.unsqueeze(over), minimum.unsqueeze(over), levels)
            codes[:1, :, :sink_tokens] = 0
            for width, plane in zip(plane_widths(bits), pack_planes(codes.flatten(2), bits), strict=True):
                self._put(records, f"{side}_plane{width}", plane)
            self._put(records, f"{side}_scale", groups.scale_codes)
            self._put(records, f"{side}_min", groups.min_codes)
            ranges.append(groups.ranges)
        self._put(records, "ranges", torch.cat(ranges, -1))

    def _unpack_affine(self, records: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        scale, minimum = self._groups(records, "k").decode()
        k.flatten(2).copy_(self._codes(records, "k"))
        torch.addcmul(minimum.unsqueeze(2), k, scale.unsqueeze(2), out=k)  # [H, P, 1, D] over the page's tokens

        unrotate(self._codes(records, "v"), *self._groups(records, "v").decode(), out=v)

    def _groups(self, records: torch.Tensor, side: str) -> Groups:
        ranges = self._get(records, "ranges", torch.bfloat16)
        return Groups(
            self._get(records, f"{side}_scale", torch.uint8),
            self._get(records, f"{side}_min", torch.uint8),
            ranges[..., :4] if side == "k" else ranges[..., 4:],
        )

    def _codes(self, records: torch.Tensor, side: str) -> torch.Tensor:
        bits = self.fmt.k_bits if side == "k" else self.fmt.v_bits
        names = [f"{side}_plane{width}" for width in plane_widths(bits)]
        return unpack_planes([self._get(records, name, torch.uint8) for name in names], bits)

    def _put(self, records: torch.Tensor, name: str, values: torch.Tensor) -> None:
        field = self.layout[name]
        records[..., field.offset : field.end] = values.contiguous().flatten(2).view(torch.uint8)

    def _get(self, records: torch.Tensor, name: str, dtype: torch.dtype) -> torch.Tensor:
        field = self.layout[name]
        return records[..., field.offset : field.end].view(dtype)

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
