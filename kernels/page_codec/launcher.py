"""Packing and unpacking whole pages on a GPU: checks, constants, one launch. Same bytes as `PageCodec` (reference.py).

Nothing here waits for the GPU: a page that cannot be packed is reported by a flag in device memory.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from sgl_hq.page_format import PAGE_TOKENS, PageLayout, plane_widths

from .hadamard import sign_matrix

# No fused multiply-add but where a kernel asks for it: the reference rounds products. 64 threads pack an affine side, a
# rotated token each; at 168 registers six such programs share a multiprocessor, for some 40 values spilled.
_PACK_AFFINE = {"num_warps": 2, "enable_fp_fusion": False}
_PACK_REGISTERS, _REGISTERS_UP_TO_DIM = 168, 128
_UNPACK_AFFINE = {"num_warps": 4, "enable_fp_fusion": False, "num_stages": 1}
_KINDS = ("bf16", "int8", "lossless", "affine")
_RUN = 4  # records that a program unpacks with one load of the sign matrix
_OTHERS = {"num_warps": 4, "enable_fp_fusion": False}


def pack_pages(
    layout: PageLayout,
    k_layers: list[torch.Tensor],
    v_layers: list[torch.Tensor],
    dense_pages: torch.Tensor,
    records: torch.Tensor,
    packed_pages: torch.Tensor,
    sink_slots: torch.Tensor | None = None,
    sink_slot: int = -1,
) -> torch.Tensor:
    """Pack P pages of all layers from the dense pool into the arena, in one launch.

    Args:
        k_layers, v_layers: one `[slots, H, D] bfloat16` (V: `Dv`), contiguous, per layer.
        dense_pages: `[P] int32 or int64`, in the order of the sequence; page p is slots 64 p .. 64 p + 63.
        records: `[layers, pages, H, record_bytes] uint8`. packed_pages: `[P]`, where each page goes; no two equal.
        sink_slots: `[layers, sinks, H, sink_bytes] uint8`; sink_slot: that of the sequence which the first of these
            pages begins, or -1 if it begins none. Both are ignored by formats without sinks.
    Returns:
        `[P] int32` on the device, not 0 where any layer or head cannot be packed (`UnpackablePageError` in the
        reference): the page's records hold garbage, keep it dense.
    Raises:
        ValueError: wrong shape, dtype, device or alignment.
    """
    _check_records(layout, records, packed_pages, 4)
    layers, _, heads, _ = records.shape
    for name, buffers, dim in (("k", k_layers, layout.head_dim), ("v", v_layers, layout.v_head_dim)):
        _check_layers(name, buffers, layers, (heads, dim), records.device)
    _check_pages("dense_pages", dense_pages, records.device)
    if len(dense_pages) != len(packed_pages):
        raise ValueError(f"{len(dense_pages)} dense pages for {len(packed_pages)} packed pages; give one each")
    fmt, pages = layout.fmt, len(dense_pages)
    has_sink = fmt.sink_tokens > 0 and sink_slot >= 0
    if has_sink:
        _check_sink("sink_slots", sink_slots, (layers, None, heads, layout.sink_bytes), records.device)
    status = torch.zeros(pages, dtype=torch.int32, device=records.device)
    if not pages * layers * heads:
        return status
    tables = _addresses(k_layers), _addresses(v_layers)
    where = (dense_pages, packed_pages, status, pages, heads, *records.stride()[:3])
    grid = layers * pages * heads
    if fmt.kind == "affine":
        from .kernel_pack import pack_affine

        sinks = sink_slots[:, sink_slot] if has_sink else records[:, 0]
        arguments = (*tables, records, sinks, *where, *sinks.stride()[:2])
        registers = _PACK_REGISTERS if max(layout.head_dim, layout.v_head_dim) <= _REGISTERS_UP_TO_DIM else None
        options = _PACK_AFFINE | {"maxnreg": registers, "HAS_SINK": has_sink}
        pack_affine[(2 * grid,)](*arguments, **affine_constants(layout), **options)
    elif fmt.kind == "lossless":
        from .kernel_lossless import pack_lossless

        constants = lossless_constants(layout) | {"RECORD_BYTES": layout.record_bytes}
        pack_lossless[(grid,)](*tables, records, *where, **constants, **_OTHERS)
    elif fmt.kind in ("int8", "bf16"):
        from .kernel_simple import pack_simple

        pack_simple[(2 * grid,)](*tables, records, *where, **simple_constants(layout), **_OTHERS)
    return status


def unpack_pages(
    layout: PageLayout,
    records: torch.Tensor,
    packed_pages: torch.Tensor,
    sink: torch.Tensor | None,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
) -> None:
    """Unpack P pages to bfloat16 in the dense pool's own layout, in one launch. All layers at once, or one layer: then
    without the dimension `layers`.

    Args:
        records: `[layers, pages, H, record_bytes] uint8`. packed_pages: `[P] int32 or int64`, in the order of the
            sequence. sink: `[layers, H, sink_bytes] uint8` of the sequence that the first of these pages begins.
        k_out: `[layers, P * 64, H, D] bfloat16`, contiguous, to be filled. v_out: the same with `Dv`.
    Raises:
        ValueError: wrong shape, dtype, device or alignment, or a sink for a format without sinks.
    """
    if records.dim() == 3:
        sink = None if sink is None else sink.unsqueeze(0)
        records, k_out, v_out = records.unsqueeze(0), k_out.unsqueeze(0), v_out.unsqueeze(0)
    _check_records(layout, records, packed_pages, 4)
    layers, _, heads, _ = records.shape
    fmt, pages = layout.fmt, len(packed_pages)
    for name, out, dim in (("k_out", k_out, layout.head_dim), ("v_out", v_out, layout.v_head_dim)):
        _check_dense(name, out, (layers, pages * PAGE_TOKENS, heads, dim), records.device)
    if sink is not None:
        if not fmt.sink_tokens:
            raise ValueError(f"a sink was given, but format {fmt.name} keeps no sink tokens")
        _check_sink("sink", sink, (layers, heads, layout.sink_bytes), records.device)
    if not pages * layers * heads:
        return
    where = (packed_pages, k_out, v_out)
    sizes = (pages, heads, *records.stride()[:3])
    if fmt.kind == "affine":
        from .kernel_unpack import unpack_affine

        sinks = records[:, 0] if sink is None else sink
        signs = [_signs(dim, records.device) for dim in (layout.head_dim, layout.v_head_dim)]
        constants = affine_constants(layout) | {"HAS_SINK": sink is not None, "RUN": _RUN}
        del constants["K_BITS"], constants["V_BITS"]
        grid = (layers * 2 * -(-pages * heads // _RUN),)
        unpack_affine[grid](records, sinks, *where, *signs, *sizes, *sinks.stride()[:2], **constants, **_UNPACK_AFFINE)
    elif fmt.kind == "lossless":
        from .kernel_lossless import unpack_lossless

        unpack_lossless[(layers * pages * heads,)](records, *where, *sizes, **lossless_constants(layout), **_OTHERS)
    elif fmt.kind in ("int8", "bf16"):
        from .kernel_simple import unpack_simple

        unpack_simple[(layers * pages * 2 * heads,)](records, *where, *sizes, **simple_constants(layout), **_OTHERS)


# Where the fields of a record are, as constants of a kernel; grouped_attention/record_constants.py makes its own of them.
# Cached: the dicts are asked for on every call.


@functools.lru_cache(maxsize=64)
def affine_constants(layout: PageLayout) -> dict[str, Any]:
    fmt = layout.fmt
    constants: dict[str, Any] = {
        "D": layout.head_dim, "DV": layout.v_head_dim, "K_BITS": fmt.k_bits, "V_BITS": fmt.v_bits,
        "K_BY_TOKEN": fmt.k_group == "token", "RANGES": layout["ranges"].offset, "SINK_TOKENS": fmt.sink_tokens,
        "V_SINK": layout.sink_fields[1].offset,
    }  # fmt: skip
    for side, bits in (("k", fmt.k_bits), ("v", fmt.v_bits)):
        planes, base = [], 0
        for width in plane_widths(bits):
            planes.append((width, base, layout[f"{side}_plane{width}"].offset))
            base += width
        constants[f"{side}_planes".upper()] = tuple(planes)
        constants[f"{side}_meta".upper()] = (layout[f"{side}_scale"].offset, layout[f"{side}_min"].offset)
    return constants


@functools.lru_cache(maxsize=16)
def lossless_constants(layout: PageLayout) -> dict[str, Any]:
    fields = {f"{side}_fields".upper(): (layout[f"{side}_raw"].offset, layout[f"{side}_exp"].offset) for side in "kv"}
    escapes = tuple(field.offset for field in layout.escape_fields)
    return fields | {"D": layout.head_dim, "DV": layout.v_head_dim, "ESCAPES": escapes, "BUDGET": layout.escape_budget}


@functools.lru_cache(maxsize=16)
def simple_constants(layout: PageLayout) -> dict[str, Any]:
    names = ("{}_codes", "{}_scale") if layout.fmt.kind == "int8" else ("{}",)
    fields = {f"{side}_fields".upper(): tuple(layout[name.format(side)].offset for name in names) for side in "kv"}
    return fields | {"D": layout.head_dim, "DV": layout.v_head_dim, "INT8": layout.fmt.kind == "int8"}


def _addresses(layers: list[torch.Tensor]) -> torch.Tensor:
    """`[layers] int64`: where each layer's buffer starts. Copied once for a pool: later calls wait for nothing."""
    return _address_table(tuple(layer.data_ptr() for layer in layers), layers[0].device)


@functools.lru_cache(maxsize=16)
def _address_table(addresses: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(addresses, dtype=torch.int64, device=device)


@functools.lru_cache(maxsize=16)
def _signs(dim: int, device: torch.device) -> torch.Tensor:
    """`sign_matrix` as float16, padded to the kernel's tile with zeros."""
    width = max(16, 1 << (dim - 1).bit_length())
    signs = torch.zeros((width, width), dtype=torch.float16, device=device)
    signs[:dim, :dim] = sign_matrix(dim, device)
    return signs


def _check_records(layout: PageLayout, records: torch.Tensor, packed_pages: torch.Tensor, dims: int) -> None:
    if layout.fmt.kind not in _KINDS:
        raise ValueError(f"format {layout.fmt.name} of kind {layout.fmt.kind} has no kernel yet: use PageCodec")
    expected = f"[layers, pages, H, {layout.record_bytes}] torch.uint8"
    if records.dim() != dims or records.shape[-1] != layout.record_bytes or records.dtype != torch.uint8:
        raise ValueError(f"records are {list(records.shape)} {records.dtype}; format {layout.fmt.name} has {expected}")
    if records.stride(-1) != 1 or any(n % 16 for n in (records.data_ptr(), *records.stride()[:-1])):
        raise ValueError("records must start on multiples of 16 bytes, with their bytes in a row: slice whole records")
    _check_pages("packed_pages", packed_pages, records.device)


def _check_pages(name: str, pages: torch.Tensor, device: torch.device) -> None:
    if pages.dim() != 1 or pages.dtype not in (torch.int32, torch.int64) or pages.device != device:
        found = f"{list(pages.shape)} {pages.dtype} on {pages.device}"
        raise ValueError(f"{name} is {found}; expected [P] torch.int32 or torch.int64 on {device}")


def _check_layers(
    name: str, buffers: list[torch.Tensor], layers: int, shape: tuple[int, int], device: torch.device
) -> None:
    if len(buffers) != layers:
        raise ValueError(f"{len(buffers)} layers of {name}, but records of {layers}")
    for buffer in buffers:
        _check_dense(name, buffer, (None, *shape), device)


def _check_dense(name: str, dense: torch.Tensor, shape: tuple[int | None, ...], device: torch.device) -> None:
    fits = dense.dim() == len(shape) and all(want in (None, got) for got, want in zip(dense.shape, shape, strict=True))
    if not fits or dense.dtype != torch.bfloat16 or dense.device != device:
        raise ValueError(f"{name} is {list(dense.shape)} {dense.dtype} on {dense.device}; expected {shape} on {device}")
    if not dense.is_contiguous() or dense.data_ptr() % 16:
        raise ValueError(f"{name} must be contiguous and start on a multiple of 16 bytes")


def _check_sink(name: str, sink: torch.Tensor | None, shape: tuple[int | None, ...], device: torch.device) -> None:
    expected = f"expected {shape} torch.uint8 on {device}, the bytes of a slot in a row"
    if sink is None:
        raise ValueError(f"{name} is missing; {expected}")
    fits = sink.dim() == len(shape) and all(want in (None, got) for got, want in zip(sink.shape, shape, strict=True))
    if not fits or sink.dtype != torch.uint8 or sink.device != device or sink.stride(-1) != 1:
        raise ValueError(f"{name} is {list(sink.shape)} {sink.dtype} on {sink.device}; {expected}")
