"""The layout of a packed page, in integers. Nothing else in the project repeats an offset or a size.

A *page* is 64 tokens of one layer and one kv head, K after RoPE. A *record* is the packed bytes of one page. Its size
is a constant of (format, head_dim, v_head_dim), so ranks of a tensor-parallel server never diverge.

    kind     what a record holds                                                       loses
    bf16     K, then V, as they are                                                     nothing, bit for bit
    int8     symmetric codes, one bfloat16 scale per token and side                     half a step
    affine   bit planes of k_bits and v_bits; scale and minimum, 8 bits each, per       half a step
             K channel (over the page's tokens) and per V token (after a Hadamard rotation)

Bit order and derivations: kernels/README.md. This module imports nothing of the project and no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

PAGE_TOKENS = 64
ALIGN_BYTES = 16  # every field and every record starts on a 16-byte boundary: one 128-bit load
BF16_BYTES = 2
SCALE_BYTES = 2  # int8: bfloat16, which has float32's exponent range: a float16 scale overflows for |x| > 127 * 65504
META_BYTES = 1  # affine: one scale code or one minimum code
RANGE_PARAMS = 8  # affine: (base, step) of K scales, K minima, V scales, V minima, all bfloat16
KINDS = ("bf16", "int8", "affine")


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
class PageFormat:
    """How a page is stored. `sink_tokens`: the first tokens of a *sequence*, kept in bfloat16 beside the records."""

    name: str
    kind: str
    k_bits: int
    v_bits: int
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"page format {self.name!r}: kind is {self.kind!r}; use one of {', '.join(KINDS)}")
        fixed_bits = {"bf16": 16, "int8": 8}.get(self.kind)
        for side, bits in (("k_bits", self.k_bits), ("v_bits", self.v_bits)):
            if fixed_bits is not None and bits != fixed_bits:
                raise ValueError(
                    f"page format {self.name!r}: {side} is {bits}; kind {self.kind} always has {fixed_bits}"
                )
            if fixed_bits is None and not 2 <= bits <= 8:
                raise ValueError(f"page format {self.name!r}: {side} is {bits}; kind affine takes 2 to 8")
        if not 0 <= self.sink_tokens < PAGE_TOKENS:
            raise ValueError(
                f"page format {self.name!r}: sink_tokens is {self.sink_tokens}; use 0 to {PAGE_TOKENS - 1}"
            )
        if self.sink_tokens and self.kind != "affine":
            raise ValueError(
                f"page format {self.name!r}: sinks are for kind affine; kind {self.kind} has no use for them"
            )

    def layout(self, head_dim: int, v_head_dim: int | None = None) -> PageLayout:
        """The record of one page for K of `head_dim` and V of `v_head_dim` (default: the same) values per token."""
        return PageLayout(self, head_dim, head_dim if v_head_dim is None else v_head_dim)


@dataclass(frozen=True)
class PageLayout:
    """Byte offsets of one record, and what a page costs. Raises ValueError for a head size that is no multiple of 8."""

    fmt: PageFormat
    head_dim: int
    v_head_dim: int

    def __post_init__(self) -> None:
        for side, dim in (("head_dim", self.head_dim), ("v_head_dim", self.v_head_dim)):
            if dim <= 0 or dim % 8:
                raise ValueError(f"{side} is {dim}; packed pages need a positive multiple of 8")
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

    @property
    def sink_fields(self) -> tuple[Field, Field]:
        """K then V of the sink tokens, token-major bfloat16, in the slot a *sequence* has (one per layer and kv
        head)."""
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
        PageFormat("int8", "int8", 8, 8),
        PageFormat("hq6", "affine", 6, 5, sink_tokens=4),
    )
}


def get_format(name: str) -> PageFormat:
    """The served page format called `name`. Raises ValueError with the supported names and the way out."""
    if name == "exact":
        raise ValueError(
            "'exact' is a serving mode, not a page format: it packs no page, so it has no layout. "
            f"Use 'bf16' for packed pages that lose no bit. Page formats: {', '.join(FORMATS)}."
        )
    if name not in FORMATS:
        raise ValueError(
            f"unknown page format {name!r}. Page formats: {', '.join(FORMATS)}. Choose one with --hq-format."
        )
    return FORMATS[name]


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
    if fmt.kind == "int8":
        scales = PAGE_TOKENS * SCALE_BYTES
        return [("k_codes", k_values), ("v_codes", v_values), ("k_scale", scales), ("v_scale", scales)]
    k_planes = [(f"k_plane{width}", k_values * width // 8) for width in plane_widths(fmt.k_bits)]
    v_planes = [(f"v_plane{width}", v_values * width // 8) for width in plane_widths(fmt.v_bits)]
    k_meta, v_meta = layout.head_dim * META_BYTES, PAGE_TOKENS * META_BYTES  # K: one group per channel. V: per token
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
