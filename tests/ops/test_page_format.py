"""The layout of a record: hand arithmetic, no overlap, alignment, and the table built from it."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sgl_hq.launch import formats as formats_table
from sgl_hq.page_format import ALIGN_BYTES, FAMILY_GRAMMAR, FORMATS, PageFormat, get_format, plane_widths

AFFINE = [
    get_format(f"K{k}{group}V{v}") for k, group, v in itertools.product(range(2, 9), ("", "t"), range(2, 9))
]
head_dims = st.integers(1, 40).map(lambda n: 8 * n)


def test_hq6_record_by_hand():
    """head_dim 64: 64 * 64 = 4096 codes a side."""
    layout = get_format("hq6").layout(64, 64)
    k_codes = 4096 * 4 // 8 + 4096 * 2 // 8  # planes of 4 and 2 bits: 2048 + 1024
    v_codes = 4096 * 4 // 8 + 4096 * 1 // 8  # planes of 4 and 1 bits: 2048 + 512
    k_meta = 64 + 64  # a scale and a minimum byte for each of 64 channels
    v_meta = 64 + 64  # and for each of 64 tokens
    ranges = 8 * 2  # 4 bfloat16 a side
    assert k_codes + v_codes + k_meta + v_meta + ranges == 5904 == 369 * 16
    assert layout.record_bytes == 5904
    assert layout.sink_bytes == 4 * (64 + 64) * 2 == 1024


def test_lossless_record_by_hand():
    """head_dim 64: a byte, then half a byte per value, then 128 bytes of escapes: 39 * (2 + 1) + 8 + 3 used."""
    layout = get_format("lossless").layout(64, 64)
    offsets = {field.name: field.offset for field in layout.fields}
    assert offsets == {"k_raw": 0, "v_raw": 4096, "k_exp": 8192, "v_exp": 10240, "escapes": 12288}
    assert layout.record_bytes == 12416 and 12416 * 8 / 8192 == 12.125
    assert layout.stored_bits_per_value() == layout.effective_bits_per_dim() == 12.125
    assert layout.escape_budget == 39
    positions, exponents, tail = layout.escape_fields
    assert (positions.offset, positions.bytes) == (12288, 78)
    assert (exponents.offset, exponents.bytes) == (12366, 39)
    assert (tail.offset, tail.end) == (12405, 12416)


@given(head_dim=head_dims, v_head_dim=head_dims)
def test_the_escape_list_lies_in_its_field(head_dim, v_head_dim):
    layout = get_format("lossless").layout(head_dim, v_head_dim)
    positions, exponents, tail = layout.escape_fields
    assert layout["escapes"].offset == positions.offset
    assert (positions.end, exponents.end) == (exponents.offset, tail.offset)
    assert 0 <= layout["escapes"].end - tail.end < 3, "no room for one more entry"
    assert layout.stored_bits_per_value() < 12.125 + 1 / 16, "alignment of the last field only"


def test_k_per_token_has_a_scale_per_token():
    channel, token = (get_format(name).layout(128, 64) for name in ("K6V5", "K6tV5"))
    assert (channel["k_scale"].bytes, channel["k_min"].bytes) == (128, 128)
    assert (token["k_scale"].bytes, token["k_min"].bytes) == (64, 64)
    assert channel["v_scale"].bytes == token["v_scale"].bytes == 64


def test_bits_against_the_quality_tables():
    """The quality tables quote 8.25 (int8) and 5.81 (sink4 K6V5 at 1,024 tokens) for head_dim 64."""
    int8, hq6 = (get_format(name).layout(64, 64) for name in ("int8", "hq6"))
    assert int8.stored_bits_per_value() == int8.effective_bits_per_dim() == 8.25  # 8 + 16 / 64, no alignment needed
    record_bits = 5904 * 8 / 8192
    assert record_bits == 5.765625
    # Effective: sinks add (16 - b) * 4 / 1024, rounded to 5.81 in the tables.
    assert hq6.effective_bits_per_dim() == record_bits + (16 - record_bits) * 4 / 1024
    assert round(hq6.effective_bits_per_dim(), 2) == 5.81
    # Stored: the 4 tokens keep their unused codes in page 0, so the whole slot comes on top: 1024 * 8 / (1024 * 128)
    # bits.
    assert hq6.stored_bits_per_value() == record_bits + 0.0625 == 5.828125


def test_bf16_costs_nothing_more():
    layout = get_format("bf16").layout(128, 64)
    assert layout.record_bytes == layout.dense_bytes == 64 * 192 * 2
    assert layout.stored_bits_per_value() == layout.effective_bits_per_dim() == 16
    assert layout.sink_bytes == 0


@given(fmt=st.sampled_from([*FORMATS.values(), *AFFINE]), head_dim=head_dims, v_head_dim=head_dims)
def test_fields_are_aligned_disjoint_and_cover_the_record(fmt, head_dim, v_head_dim):
    layout = fmt.layout(head_dim, v_head_dim)
    end = 0
    for field in layout.fields:
        assert field.bytes > 0
        assert field.offset % ALIGN_BYTES == 0
        assert 0 <= field.offset - end < ALIGN_BYTES, "gaps are alignment only, and nothing overlaps"
        end = field.end
    assert 0 <= layout.record_bytes - end < ALIGN_BYTES
    assert layout.record_bytes % ALIGN_BYTES == 0
    assert layout.sink_bytes % ALIGN_BYTES == 0
    assert layout.stored_bits_per_value() >= layout.effective_bits_per_dim()


@given(bits=st.integers(1, 8))
def test_plane_widths_add_up(bits):
    widths = plane_widths(bits)
    assert sum(widths) == bits
    assert list(widths) == sorted(set(widths), reverse=True)
    assert set(widths) <= {8, 4, 2, 1}


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_plane_widths_refuse(bits):
    with pytest.raises(ValueError, match="1 to 8"):
        plane_widths(bits)


def test_every_width_is_its_bits_in_the_record():
    for fmt in AFFINE:
        layout = fmt.layout(64, 128)
        sizes = {field.name: field.bytes for field in layout.fields}
        assert sum(size for name, size in sizes.items() if name.startswith("k_plane")) == 64 * 64 * fmt.k_bits // 8
        assert sum(size for name, size in sizes.items() if name.startswith("v_plane")) == 64 * 128 * fmt.v_bits // 8


def test_get_format_says_what_to_do():
    with pytest.raises(ValueError, match="serving mode.*'bf16' or 'lossless'.*bf16, lossless, int8, hq7"):
        get_format("exact")
    with pytest.raises(ValueError, match="sink_tokens is 64; use 0 to 63"):
        get_format("sink64-K6V5")


@pytest.mark.parametrize(
    "name", "hq9,,K6,K9V5,K6V1,k6v5,sink0-K6V5,sink04-K6V5,sink4 K6V5,K6V5t,K6V5\n,xK6V5,sink-K6V5".split(",")
)
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match="unknown page format.*bf16, lossless, int8, hq7.*sink4-K5V4.*--hq-format"):
        get_format(name)


def test_presets_are_the_documented_points():
    assert list(FORMATS) == ["bf16", "lossless", "int8", "hq7", "hq6", "hq5", "hq4", "hq3", "hq2"]
    assert all(get_format(name) is fmt for name, fmt in FORMATS.items())
    assert [name for name, fmt in FORMATS.items() if not fmt.lossy] == ["bf16", "lossless"]
    for preset, member in {"hq7": "K7V5", "hq6": "K6V5", "hq5": "K5V4", "hq4": "K4V4", "hq3": "K3V3", "hq2": "K2V2"}.items():
        assert FORMATS[preset] == replace(get_format(f"sink4-{member}"), name=preset)


@given(
    sinks=st.integers(0, 63),
    k_bits=st.integers(2, 8),
    v_bits=st.integers(2, 8),
    k_group=st.sampled_from(["channel", "token"]),
)
def test_family_names_say_what_they_are(sinks, k_bits, v_bits, k_group):
    name = f"sink{sinks}-" * (sinks > 0) + f"K{k_bits}{'t' * (k_group == 'token')}V{v_bits}"
    assert get_format(name) == PageFormat(name, "affine", k_bits, v_bits, sinks, k_group)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("x", "fp8", 8, 8), "kind is 'fp8'"),
        (("x", "affine", 1, 4), "k_bits is 1"),
        (("x", "affine", 4, 9), "v_bits is 9"),
        (("x", "int8", 8, 7), "v_bits is 7"),
        (("x", "bf16", 16, 16, 4), "sinks are for kinds affine and transform"),
        (("x", "affine", 4, 4, 64), "sink_tokens is 64"),
        (("x", "lossless", 16, 16), "k_bits is 16; kind lossless always has 12"),
        (("x", "affine", 4, 4, 0, "page"), "k_group is 'page'; kind affine takes channel or token"),
        (("x", "int8", 8, 8, 0, "token"), "k_group is 'token'; kind int8 takes channel"),
    ],
)
def test_bad_formats_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        PageFormat(*arguments)


def test_bad_sizes_are_refused():
    for head_dim in (0, -8, 60):
        with pytest.raises(ValueError, match=f"head_dim is {head_dim}"):
            get_format("hq6").layout(head_dim, 64)
    with pytest.raises(ValueError, match="v_head_dim is 4"):
        get_format("hq6").layout(64, 4)
    with pytest.raises(ValueError, match="head_dim is 1032; a lossless page holds up to 1024: use bf16"):
        get_format("lossless").layout(1032)
    with pytest.raises(ValueError, match="prefix_tokens is 100"):
        get_format("hq6").layout(64, 64).stored_bits_per_value(100)


def test_page_format_imports_nothing_heavy():
    loaded = "import sys, sgl_hq.page_format; print([m for m in ('torch', 'sglang', 'rich') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_table_has_every_format_and_only_layout_numbers():
    rows = formats_table.rows()
    assert [(row["format"], row["head_dim"]) for row in rows] == [(name, dim) for name in FORMATS for dim in (64, 128)]
    for row in rows:
        layout = FORMATS[row["format"]].layout(row["head_dim"], row["head_dim"])
        assert row["stored_bits_per_value"] == layout.stored_bits_per_value(1024)
        assert row["effective_bits_per_dim"] == layout.effective_bits_per_dim(1024)
        assert row["record_bytes"] == layout.record_bytes
        assert row["ratio_to_bf16"] == 16 / layout.stored_bits_per_value(1024)
        assert row["lossy"] is (row["format"] not in ("bf16", "lossless"))


def test_table_fits_a_terminal_and_names_the_gate():
    console = Console(width=80, file=io.StringIO())
    console.print(formats_table.table())
    shown = console.file.getvalue()
    for name in FORMATS:
        assert f" {name} " in shown, "no name is cut"
    assert "…" not in shown
    words = " ".join(shown.split())
    assert "sgl-hq gate --model" in words and FAMILY_GRAMMAR in words
