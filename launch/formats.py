"""The table of page formats: bits, bytes and whether they lose any. Every number comes from the layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sgl_hq.page_format import CALIBRATED_GRAMMAR, FAMILY_GRAMMAR, FORMATS, STATED_PREFIX_TOKENS

if TYPE_CHECKING:
    from rich.table import Table

HEAD_DIMS = (64, 128)

_NOTE = (
    f"Bits at a prefix of {STATED_PREFIX_TOKENS:,} tokens. Effective: modelled codes and metadata. Stored: bytes really held, "
    "with alignment and one sink slot per sequence. Record: one page of 64 tokens of one layer and kv head. "
    "A lossy format is served after it has passed on your model: sgl-hq gate --model MODEL --format FORMAT. "
    f"hq7 to hq2 are points of a family: {FAMILY_GRAMMAR}; t = K per token, else per channel. "
    f"Smaller for the same quality: {CALIBRATED_GRAMMAR}. "
    "'exact' is a serving mode that packs nothing, so it has no row."
)


def rows() -> list[dict[str, Any]]:
    """One row per (format, head_dim), K and V of the same head_dim; bits per value, bytes per page, layer and kv
    head."""
    return [_row(name, head_dim) for name in FORMATS for head_dim in HEAD_DIMS]


def table() -> Table:
    """`rows()` for a terminal."""
    from rich.markup import escape  # the grammar has square brackets
    from rich.table import Table

    shown = Table(title="Page formats", caption=escape(_NOTE), caption_justify="left")
    shown.add_column("format")
    shown.add_column("loses\nbits")
    for column in ("head\ndim", "effective\nbits", "stored\nbits", "record\nbytes", "sink\nbytes", "bf16 /\nstored"):
        shown.add_column(column, justify="right")
    for row in rows():
        shown.add_row(
            row["format"],
            "yes" if row["lossy"] else "no",
            str(row["head_dim"]),
            f"{row['effective_bits_per_dim']:.3f}",
            f"{row['stored_bits_per_value']:.3f}",
            f"{row['record_bytes']:,}",
            f"{row['sink_bytes']:,}",
            f"{row['ratio_to_bf16']:.2f}x",
        )
    return shown


def _row(name: str, head_dim: int) -> dict[str, Any]:
    layout = FORMATS[name].layout(head_dim, head_dim)
    stored_bits = layout.stored_bits_per_value(STATED_PREFIX_TOKENS)
    return {
        "format": name,
        "head_dim": head_dim,
        "prefix_tokens": STATED_PREFIX_TOKENS,
        "effective_bits_per_dim": layout.effective_bits_per_dim(STATED_PREFIX_TOKENS),
        "stored_bits_per_value": stored_bits,
        "record_bytes": layout.record_bytes,
        "sink_bytes": layout.sink_bytes,
        "ratio_to_bf16": FORMATS["bf16"].layout(head_dim, head_dim).stored_bits_per_value(STATED_PREFIX_TOKENS) / stored_bits,
        "lossy": FORMATS[name].lossy,
    }
