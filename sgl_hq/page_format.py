"""The layout of a packed page, in integers. Nothing else in the project repeats an offset or a size.

A *page* is 64 tokens of one layer and one kv head, K after RoPE. A *record* is the packed bytes of one page. Its size
is a constant of (format, head_dim, v_head_dim), so ranks of a tensor-parallel server never diverge.

    kind     what a record holds                                                       loses
    bf16     K, then V, as they are                                                     nothing, bit for bit
    int8     symmetric codes, one bfloat16 scale per token and side                     half a step
    lossless sign and mantissa as they are, 4-bit exponent codes, a fixed list of escapes    nothing, bit for bit
    affine   bit planes of k_bits and v_bits; scale and minimum, 8 bits each, per V token    half a step
             (after a Hadamard rotation) and per K channel over the page's tokens, or per K token after a rotation
    transform bit planes of a width for every 8 components of K and of V in a basis of the       half a step
             model's own; minimum and range, 8 bits each, per component over the page's tokens

Bit order and derivations: kernels/README.md. This module imports nothing of the project and no torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

LAYOUT_VERSION = 1  # raise it when a record of an existing format gets other bytes: gate records name it
PAGE_TOKENS = 64
STATED_PREFIX_TOKENS = 1024  # prefix length at which a format's bits are quoted (formats.md)
ALIGN_BYTES = 16  # every field and every record starts on a 16-byte boundary: one 128-bit load
BF16_BYTES = 2
SCALE_BYTES = 2  # int8: bfloat16, which has float32's exponent range: a float16 scale overflows for |x| > 127 * 65504
META_BYTES = 1  # affine: one scale code or one minimum code
RANGE_PARAMS = 8  # affine: (base, step) of K scales, K minima, V scales, V minima, all bfloat16
BASE_CHANNELS = 8  # lossless: consecutive K channels that share a base; V has one base a page
ESCAPE_POSITION_BYTES, ESCAPE_EXPONENT_BYTES = 2, 1
MAX_LOSSLESS_DIM = 2 ** (8 * ESCAPE_POSITION_BYTES) // PAGE_TOKENS  # a position in a page must fit two bytes
SPAN_CHANNELS = 8  # transform: components that share a width
KINDS = ("bf16", "lossless", "int8", "affine", "transform")
KINDS_WITH_SINKS = ("affine", "transform")
FAMILY_GRAMMAR = "[sink{n}-]K{k}[t]V{v} with n in 1..63 and k, v in 2..8, for example sink4-K5V4"
CALIBRATED_GRAMMAR = "calib{bits}, for example calib4.5, after `sgl-hq calibrate`"


@dataclass(frozen=True)
class Field:
    """One run of bytes of a record: [offset, offset + bytes)."""

    name: str
    offset: int
    bytes: int

    @property
    def end(self) -> int:
        return self.offset + self.bytes


@dataclass(frozen=True)
class Span:
    """Kind transform: the components [first, end) of side "k" or "v" have codes of `bits` bits."""

    side: str
    first: int
    end: int
    bits: int

    def plane(self, width: int) -> str:
        """Name of the field that holds the span's bit plane of `width`; token-major codes."""
        return f"{self.side}{self.first}_plane{width}"


@dataclass(frozen=True)
class PageFormat:
    """How a page is stored.

    `sink_tokens`: the first tokens of a *sequence*, kept in bfloat16 beside the records. `k_group`, for kind affine:
    what shares a scale and a minimum in K, a "channel" over the page's tokens or a "token" over its rotated channels.
    `k_widths`, `v_widths`, for kind transform: bits of every 8 components, descending; `k_bits`, `v_bits` are the largest.
    """

    name: str
    kind: str
    k_bits: int
    v_bits: int
    sink_tokens: int = 0
    k_group: str = "channel"
    k_widths: tuple[int, ...] = ()
    v_widths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"page format {self.name!r}: kind is {self.kind!r}; use one of {', '.join(KINDS)}")
        fixed_bits = {"bf16": 16, "lossless": 12, "int8": 8}.get(self.kind)
        for side, bits in (("k_bits", self.k_bits), ("v_bits", self.v_bits)):
            if fixed_bits is not None and bits != fixed_bits:
                raise ValueError(
                    f"page format {self.name!r}: {side} is {bits}; kind {self.kind} always has {fixed_bits}"
                )
            if fixed_bits is None and not 2 <= bits <= 8:
                raise ValueError(f"page format {self.name!r}: {side} is {bits}; kind {self.kind} takes 2 to 8")
            widths = self.k_widths if side == "k_bits" else self.v_widths
            if self.kind == "transform" and (max(widths, default=0) != bits or list(widths) != sorted(widths, reverse=True)):
                raise ValueError(f"page format {self.name!r}: widths {widths} must descend from {side}, {bits}")
            if self.kind != "transform" and widths:
                raise ValueError(f"page format {self.name!r}: widths are for kind transform, not {self.kind}")
        if not 0 <= self.sink_tokens < PAGE_TOKENS:
            raise ValueError(
                f"page format {self.name!r}: sink_tokens is {self.sink_tokens}; use 0 to {PAGE_TOKENS - 1}"
            )
        if self.sink_tokens and self.kind not in KINDS_WITH_SINKS:
            raise ValueError(
                f"page format {self.name!r}: sinks are for kinds {' and '.join(KINDS_WITH_SINKS)}; kind {self.kind} has no use for them"
            )
        known = ("channel", "token") if self.kind == "affine" else ("channel",)
        if self.k_group not in known:
            raise ValueError(
                f"page format {self.name!r}: k_group is {self.k_group!r}; kind {self.kind} takes {' or '.join(known)}"
            )

    @property
    def lossy(self) -> bool:
        """False: unpacking restores every bit, and gives bfloat16. True: it gives float32."""
        return self.kind not in ("bf16", "lossless")

    def layout(self, head_dim: int, v_head_dim: int | None = None) -> PageLayout:
        """The record of one page for K of `head_dim` and V of `v_head_dim` (default: the same) values per token."""
        return PageLayout(self, head_dim, head_dim if v_head_dim is None else v_head_dim)


@dataclass(frozen=True)
class PageLayout:
    """Byte offsets of one record, and what a page costs.

    Raises ValueError for a head size that is no multiple of 8, or above 1024 for kind lossless.
    """

    fmt: PageFormat
    head_dim: int
    v_head_dim: int

    def __post_init__(self) -> None:
        for side, dim in (("head_dim", self.head_dim), ("v_head_dim", self.v_head_dim)):
            if dim <= 0 or dim % 8:
                raise ValueError(f"{side} is {dim}; packed pages need a positive multiple of 8")
            if self.fmt.kind == "lossless" and dim > MAX_LOSSLESS_DIM:
                raise ValueError(f"{side} is {dim}; a lossless page holds up to {MAX_LOSSLESS_DIM}: use bf16")
            widths = self.fmt.k_widths if side == "head_dim" else self.fmt.v_widths
            if self.fmt.kind == "transform" and len(widths) * SPAN_CHANNELS != dim:
                raise ValueError(f"format {self.fmt.name} has widths for {len(widths) * SPAN_CHANNELS} components, {side} is {dim}")
        # Derived once, here: the codec asks for offsets on every decode step.
        object.__setattr__(self, "_fields", {field.name: field for field in _place(_field_sizes(self))})

    @property
    def fields(self) -> tuple[Field, ...]:
        """All fields in the order of their offsets; gaps between them are alignment only."""
        return tuple(self._fields.values())

    def __getitem__(self, name: str) -> Field:
        return self._fields[name]

    @property
    def record_bytes(self) -> int:
        return _align(self.fields[-1].end)

    def spans(self, side: str) -> tuple[Span, ...]:
        """Kind transform: runs of components with one width, of side "k" or "v"."""
        widths = self.fmt.k_widths if side == "k" else self.fmt.v_widths
        starts = [i for i in range(len(widths)) if i == 0 or widths[i] != widths[i - 1]]
        ends = [*starts[1:], len(widths)]
        return tuple(
            Span(side, first * SPAN_CHANNELS, end * SPAN_CHANNELS, widths[first]) for first, end in zip(starts, ends)
        )

    @property
    def escape_budget(self) -> int:
        """Kind lossless: entries of the escape list that K and V of a page share."""
        return (self["escapes"].bytes - self._escape_tail_bytes) // (ESCAPE_POSITION_BYTES + ESCAPE_EXPONENT_BYTES)

    @property
    def escape_fields(self) -> tuple[Field, Field, Field]:
        """Kind lossless: the parts of field `escapes`, not aligned: uint16 positions, uint8 exponents, and the tail: K
        bases, V base, number of K escapes, number of V escapes, uint8."""
        budget = self.escape_budget
        positions = Field("positions", self["escapes"].offset, budget * ESCAPE_POSITION_BYTES)
        exponents = Field("exponents", positions.end, budget * ESCAPE_EXPONENT_BYTES)
        return positions, exponents, Field("tail", exponents.end, self._escape_tail_bytes)

    @property
    def _escape_tail_bytes(self) -> int:
        return self.head_dim // BASE_CHANNELS + 3

    @property
    def sink_fields(self) -> tuple[Field, Field]:
        """K then V of the sink tokens, token-major bfloat16, in the slot of a *sequence* (per layer and kv head)."""
        k_bytes = self.fmt.sink_tokens * self.head_dim * BF16_BYTES
        v_bytes = self.fmt.sink_tokens * self.v_head_dim * BF16_BYTES
        return Field("k_sink", 0, k_bytes), Field("v_sink", k_bytes, v_bytes)

    @property
    def sink_bytes(self) -> int:
        return _align(self.sink_fields[1].end)

    @property
    def dense_bytes(self) -> int:
        """The same page in bfloat16."""
        return PAGE_TOKENS * (self.head_dim + self.v_head_dim) * BF16_BYTES

    def stored_bits_per_value(self, prefix_tokens: int = 1024) -> float:
        """Bits really held per K or V value: whole records with alignment, and one sink slot per sequence."""
        stored_bytes = _pages(prefix_tokens) * self.record_bytes + self.sink_bytes
        return 8 * stored_bytes / (prefix_tokens * (self.head_dim + self.v_head_dim))

    def effective_bits_per_dim(self, prefix_tokens: int = 1024) -> float:
        """Modelled bits per value: codes and metadata, no alignment; a sink token replaces its 16 - b packed bits.

        The rule of the quality tables: sink tokens add (16 - b) * sink_tokens / prefix_tokens, as if their (unused)
        codes in page 0 took no room. `stored_bits_per_value` counts that room, so it is the larger one.
        """
        _pages(prefix_tokens)
        packed = 8 * sum(field.bytes for field in self.fields) / (PAGE_TOKENS * (self.head_dim + self.v_head_dim))
        return packed + (16 - packed) * self.fmt.sink_tokens / prefix_tokens


FORMATS: dict[str, PageFormat] = {
    fmt.name: fmt
    for fmt in (
        PageFormat("bf16", "bf16", 16, 16),
        PageFormat("lossless", "lossless", 12, 12),
        PageFormat("int8", "int8", 8, 8),
        PageFormat("hq7", "affine", 7, 5, sink_tokens=4),
        PageFormat("hq6", "affine", 6, 5, sink_tokens=4),
        PageFormat("hq5", "affine", 5, 4, sink_tokens=4),
        PageFormat("hq4", "affine", 4, 4, sink_tokens=4),
        PageFormat("hq3", "affine", 3, 3, sink_tokens=4),
        PageFormat("hq2", "affine", 2, 2, sink_tokens=4),
    )
}
DEFAULT_LOSSY = "hq7"  # the smallest preset that passes the quality gate on the demo model (docs/quality.md)
_CALIBRATED = re.compile(r"calib([2-8](?:\.[0-9]{1,2})?)")
_FAMILY = re.compile(r"(?:sink([1-9][0-9]?)-)?K([2-8])(t?)V([2-8])")


def calibrated_bits(name: str) -> float | None:
    """Stored bits per value that the calibrated format `name` may use, or None for a format of another kind."""
    found = _CALIBRATED.fullmatch(name)
    return float(found[1]) if found else None


def check_format_name(name: str) -> None:
    """Raises ValueError, with the supported names, unless a server could hold pages in `name`."""
    if calibrated_bits(name) is None:
        get_format(name)


def is_lossy(name: str) -> bool:
    """Of a name that `check_format_name` accepts."""
    return calibrated_bits(name) is not None or get_format(name).lossy


def get_format(name: str) -> PageFormat:
    """The served page format called `name`: a preset of FORMATS, or a point of the affine family (`FAMILY_GRAMMAR`).

    Raises ValueError with the supported names and the way out.
    """
    if name in FORMATS:
        return FORMATS[name]
    if member := _FAMILY.fullmatch(name):
        sinks, k_bits, per_token, v_bits = member.groups()
        k_group = "token" if per_token else "channel"
        return PageFormat(name, "affine", int(k_bits), int(v_bits), int(sinks or 0), k_group)
    known = f"Page formats: {', '.join(FORMATS)}, {FAMILY_GRAMMAR}, or {CALIBRATED_GRAMMAR}."
    if calibrated_bits(name) is not None:
        raise ValueError(f"{name!r} has a page format of its own in every layer of a model: see layer_codecs.py")
    if name == "exact":
        raise ValueError(
            "'exact' is a serving mode, not a page format: it packs no page, so it has no layout. "
            f"Use 'bf16' or 'lossless' for packed pages that lose no bit. {known}"
        )
    raise ValueError(f"unknown page format {name!r}. {known} Choose one with --hq-format.")


def mean_stored_bits(layouts: Sequence[PageLayout], prefix_tokens: int = 1024) -> float:
    """Stored bits per value over layers, whose layouts may differ in their widths only."""
    return sum(layout.stored_bits_per_value(prefix_tokens) for layout in layouts) / len(layouts)


def plane_widths(bits: int) -> tuple[int, ...]:
    """Widths of the bit planes of a `bits`-wide code, widest first: 8 | 4, 2, 1 as needed (7 = 4+2+1, 5 = 4+1)."""
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def _field_sizes(layout: PageLayout) -> list[tuple[str, int]]:
    fmt = layout.fmt
    k_values, v_values = PAGE_TOKENS * layout.head_dim, PAGE_TOKENS * layout.v_head_dim
    if fmt.kind == "bf16":
        return [("k", k_values * BF16_BYTES), ("v", v_values * BF16_BYTES)]
    if fmt.kind == "lossless":
        escapes = layout.head_dim + layout.v_head_dim  # 1/8 bit per value
        codes = [("k_exp", k_values // 2), ("v_exp", v_values // 2)]
        return [("k_raw", k_values), ("v_raw", v_values), *codes, ("escapes", escapes)]
    if fmt.kind == "int8":
        scales = PAGE_TOKENS * SCALE_BYTES
        return [("k_codes", k_values), ("v_codes", v_values), ("k_scale", scales), ("v_scale", scales)]
    if fmt.kind == "transform":
        planes = [
            (span.plane(width), PAGE_TOKENS * (span.end - span.first) * width // 8)
            for side in ("k", "v")
            for span in layout.spans(side)
            for width in plane_widths(span.bits)
        ]
        dims = (("k", layout.head_dim), ("v", layout.v_head_dim))
        meta = [(f"{side}_{name}", dim * META_BYTES) for side, dim in dims for name in ("scale", "min")]
        return [*planes, *meta, ("ranges", RANGE_PARAMS * BF16_BYTES)]
    k_planes = [(f"k_plane{width}", k_values * width // 8) for width in plane_widths(fmt.k_bits)]
    v_planes = [(f"v_plane{width}", v_values * width // 8) for width in plane_widths(fmt.v_bits)]
    k_groups = layout.head_dim if fmt.k_group == "channel" else PAGE_TOKENS
    k_meta, v_meta = k_groups * META_BYTES, PAGE_TOKENS * META_BYTES
    meta = [("k_scale", k_meta), ("k_min", k_meta), ("v_scale", v_meta), ("v_min", v_meta)]
    return [*k_planes, *v_planes, *meta, ("ranges", RANGE_PARAMS * BF16_BYTES)]


def _place(sizes: list[tuple[str, int]]) -> list[Field]:
    fields, offset = [], 0
    for name, size in sizes:
        fields.append(Field(name, offset, size))
        offset = _align(offset + size)
    return fields


def _align(count: int) -> int:
    return -(-count // ALIGN_BYTES) * ALIGN_BYTES


def _pages(prefix_tokens: int) -> int:
    if prefix_tokens <= 0 or prefix_tokens % PAGE_TOKENS:
        raise ValueError(f"prefix_tokens is {prefix_tokens}; only whole pages of {PAGE_TOKENS} tokens are packed")
    return prefix_tokens // PAGE_TOKENS
