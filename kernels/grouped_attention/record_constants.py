"""Where the fields of a record lie, as constants that the grouped kernels are compiled for. Cached: every launch asks."""

from __future__ import annotations

import functools
from typing import Any

from sgl_hq.kernels.page_codec.launcher import affine_constants, lossless_constants, simple_constants
from sgl_hq.page_format import PageLayout

CODED_KINDS = ("affine", "int8")  # codes and scales: small tiles read them as left operands, large ones on Hopper unpack them


@functools.lru_cache(maxsize=16)
def small_constants(layout: PageLayout) -> dict[str, Any]:
    """Byte offsets of a record's fields, as constants of kernel_small.py."""
    fmt = layout.fmt
    out: dict[str, Any] = {"KIND": fmt.kind, "K_BITS": 0, "V_BITS": 0, "META": (0,), "SINKS": fmt.sink_tokens}
    if fmt.kind == "affine":
        found = affine_constants(layout)
        fields = {f"{side}_FIELDS": tuple(offset for _, _, offset in found[f"{side}_PLANES"]) for side in "KV"}
        meta = (*found["K_META"], *found["V_META"], found["RANGES"])
        return out | fields | {"K_BITS": fmt.k_bits, "V_BITS": fmt.v_bits, "META": meta}
    found = lossless_constants(layout) if fmt.kind == "lossless" else simple_constants(layout)
    fields = {side: found[side] for side in ("K_FIELDS", "V_FIELDS")}
    if fmt.kind == "int8":
        codes = {side: offsets[:1] for side, offsets in fields.items()}
        return out | codes | {"K_BITS": 8, "V_BITS": 8, "META": (fields["K_FIELDS"][1], fields["V_FIELDS"][1])}
    return out | fields | ({"META": (*found["ESCAPES"], found["BUDGET"])} if fmt.kind == "lossless" else {})


@functools.lru_cache(maxsize=16)
def expand_constants(layout: PageLayout) -> dict[str, Any]:
    """The same for kernel_expand.py: planes of affine pages, fields of others."""
    out: dict[str, Any] = {"K_META": (0,), "V_META": (0,), "RANGES": 0, "ESCAPES": (0,), "BUDGET": 0}
    if layout.fmt.kind == "affine":
        found = affine_constants(layout)
        return out | {name: found[name] for name in ("K_PLANES", "V_PLANES", "K_META", "V_META", "RANGES")}
    found = lossless_constants(layout) if layout.fmt.kind == "lossless" else simple_constants(layout)
    fields = {"K_PLANES": found["K_FIELDS"], "V_PLANES": found["V_FIELDS"]}
    return out | fields | {name: found[name] for name in ("ESCAPES", "BUDGET") if name in found}


@functools.lru_cache(maxsize=16)
def hopper_constants(layout: PageLayout) -> dict[str, Any]:
    """The same for kernel_hopper_pages.py."""
    kind, size = layout.fmt.kind, {"RECORD_BYTES": layout.record_bytes}
    if kind not in CODED_KINDS:
        return size | {"KIND": "expanded", "K_PLANES": (), "V_PLANES": (), "META": ()}
    planes = {name: expand_constants(layout)[name] for name in ("K_PLANES", "V_PLANES")}
    if kind == "int8":  # bytes are a plane of 8 bits
        planes = {name: ((8, 0, codes),) for name, (codes, _) in planes.items()}
    return size | {"KIND": kind, "META": small_constants(layout)["META"]} | planes
