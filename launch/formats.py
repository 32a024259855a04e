"""The table of page formats: bits, bytes and what is known of their quality. Every number comes from the layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sgl_hq.page_format import FORMATS

if TYPE_CHECKING:
    from rich.table import Table

HEAD_DIMS = (64, 128)
PREFIX_TOKENS = 1024

# Known quality, by format. The measured ones: SmolLM2-135M-Instruct, stored prefix fake-quantised on a CPU, 49 trials
# of 16 steps against all gate bounds.
_QUALITY = {
    "bf16": "keeps every bit",
    "int8": "lossy; 49 of 49 strict trials pass on SmolLM2-135M",
    "hq6": "lossy; 49 of 49 strict trials pass on SmolLM2-135M",
}
_NOTE = (
    f"Bits at a prefix of {PREFIX_TOKENS:,} tokens. Effective: modelled codes and metadata. Stored: bytes really held, "
    "with alignment and one sink slot per sequence. Record: one page of 64 tokens of one layer and kv head. "
    "'exact' is a serving mode that packs nothing, so it has no row. The quality facts come from an offline study and "
    "hold for that model only; the quality gate that measures yours arrives later."
)


def rows() -> list[dict[str, Any]]:
    """One row per (format, head_dim), K and V of the same head_dim; bits per value, bytes per page, layer and kv
    head."""
    return [_row(name, head_dim) for name in FORMATS for head_dim in HEAD_DIMS]


def table() -> Table:
    """`rows()` for a terminal."""
    from rich.table import Table

    quality = "\n".join(f"{name}: {fact}" for name, fact in _QUALITY.items())
    shown = Table(title="Page formats", caption=f"{quality}\n{_NOTE}", caption_justify="left")
    shown.add_column("format")
    for column in ("head\ndim", "effective\nbits", "stored\nbits", "record\nbytes", "sink\nbytes", "bf16 /\nstored"):
        shown.add_column(column, justify="right")
    for row in rows():
        shown.add_row(
            row["format"],
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
    stored_bits = layout.stored_bits_per_value(PREFIX_TOKENS)
    return {
        "format": name,
        "head_dim": head_dim,
        "prefix_tokens": PREFIX_TOKENS,
        "effective_bits_per_dim": layout.effective_bits_per_dim(PREFIX_TOKENS),
        "stored_bits_per_value": stored_bits,
        "record_bytes": layout.record_bytes,
        "sink_bytes": layout.sink_bytes,
        "ratio_to_bf16": FORMATS["bf16"].layout(head_dim, head_dim).stored_bits_per_value(PREFIX_TOKENS) / stored_bits,
        "quality": _QUALITY[name],
    }
