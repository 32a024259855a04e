"""Pack and unpack against what was packed: bit equality where the format promises it, derived bounds elsewhere."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_hq.kernels.page_codec import NonFiniteError, PageCodec, hadamard
from sgl_hq.kernels.page_codec.bitplanes import pack_planes, unpack_planes
from sgl_hq.kernels.page_codec.hadamard import block_size, sign_matrix
from sgl_hq.page_format import FORMATS, PageFormat, plane_widths

_spec = importlib.util.spec_from_file_location("tolerances", Path(__file__).parents[1] / "tolerances.py")
tolerances = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tolerances)

LOSSY = [FORMATS["int8"], FORMATS["hq6"]]
AFFINE = [
    PageFormat(f"sink4 K{k}V{v}", "affine", k, v, sink_tokens=4) for k, v in itertools.product(range(2, 9), repeat=2)
]
CONTENTS = ["random", "offset", "constant", "zero", "huge", "tiny", "subnormal", "one_outlier", "outlier_channels"]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """torch.empty gives 0xFF bytes (NaN as a float): an output value that nobody wrote cannot pass."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        tensor.view(torch.uint8).fill_(255) if tensor.numel() else None
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def test_the_poison_works():
    assert torch.empty(3).isnan().all()
    assert torch.empty(3, dtype=torch.bfloat16).isnan().all()


def make(contents: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """`[P, 64, H, D] bfloat16`."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if contents == "offset":
        x = x * 0.1 + 37
    elif contents == "constant":
        x = torch.full(shape, -1.7)
    elif contents == "zero":
        x = torch.zeros(shape)
    elif contents in ("huge", "tiny", "subnormal"):
        x = x * {"huge": 1e30, "tiny": 1e-30, "subnormal": 1e-39}[contents]
    elif contents == "one_outlier" and x.numel():
        x[-1, 17, -1, 5] = 1e30
    elif contents == "outlier_channels":
        x[..., 3] += 200
        x[..., 6] *= 50
    return x.to(torch.bfloat16)


def head_major(x: torch.Tensor) -> torch.Tensor:
    """`[P, 64, H, D]` to `[H, P * 64, D]`."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)


# --- bit planes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [0, 1, 3, 17])
@pytest.mark.parametrize("bits", range(1, 9))
def test_bit_planes_round_trip(bits, pages):
    codes = torch.randint(
        0, 2**bits, (pages, 2, 64 * 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits)
    )
    planes = pack_planes(codes, bits)
    assert [plane.shape[-1] for plane in planes] == [64 * 24 * width // 8 for width in plane_widths(bits)]
    assert torch.equal(unpack_planes(planes, bits), codes)


def test_bit_order_is_the_documented_one():
    """Six bits, 64 codes, by hand: low nibble = first half; the 2-bit plane holds the bits above the nibble, in
    quarters."""
    codes = torch.arange(64, dtype=torch.uint8)
    four, two = pack_planes(codes, 6)
    assert four.tolist() == [(j % 16) | ((j + 32) % 16) << 4 for j in range(32)]
    assert two.tolist() == [sum(((j + 16 * slot) >> 4) << 2 * slot for slot in range(4)) for j in range(16)]


@given(data=st.data(), bits=st.integers(1, 8), tokens=st.integers(1, 5))
def test_bit_planes_keep_any_codes(data, bits, tokens):
    codes = torch.tensor(data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=64, max_size=64)), dtype=torch.uint8)
    codes = codes.repeat(tokens)
    assert torch.equal(unpack_planes(pack_planes(codes, bits), bits), codes)


# --- rotation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "block"), [(8, 8), (64, 64), (80, 16), (96, 32), (128, 128), (256, 256)])
def test_hadamard_is_orthonormal(dim, block):
    signs = sign_matrix(dim, torch.device("cpu"))
    assert block_size(dim) == block
    assert torch.equal(signs @ signs, block * torch.eye(dim))
    assert torch.equal(signs, signs.T)
    # unpack relies on this: the rotation of a constant only touches the first channel of a block
    assert torch.equal(signs.sum(0), torch.where(torch.arange(dim) % block == 0, block, 0).float())


# --- bf16 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [0, 1, 3, 17])
def test_bf16_keeps_every_bit(pages):
    """All 65,536 patterns when there is room: NaN payloads, both infinities, -0.0 and subnormals among them."""
    codec = PageCodec(FORMATS["bf16"], 64, 32)
    k, v = (torch.arange(pages * 64 * 3 * dim).to(torch.int16).view(pages, 64, 3, dim) for dim in (64, 32))
    records, sink = codec.pack(k.view(torch.bfloat16), v.view(torch.bfloat16), first_has_sink=pages > 0)
    assert sink is None
    for got, packed in zip(codec.unpack(records), (k, v), strict=True):
        assert got.is_contiguous()
        assert torch.equal(got.view(torch.int16), head_major(packed))


# --- error bounds ---------------------------------------------------------------------------------------------------


def check_int8(codec: PageCodec, k: torch.Tensor, v: torch.Tensor) -> None:
    records, _ = codec.pack(k, v, first_has_sink=False)
    for side, packed, got in zip("kv", (k, v), codec.unpack(records), strict=True):
        field = codec.layout[f"{side}_scale"]
        scale = records[..., field.offset : field.end].view(torch.bfloat16).transpose(0, 1).flatten(1).double()
        packed = head_major(packed).double()
        assert (scale <= tolerances.int8_scale(packed.abs().amax(-1))).all(), f"{side}: wasteful scale"
        assert ((got.double() - packed).abs() <= tolerances.int8_error(scale).unsqueeze(-1)).all(), side


def stored(codec: PageCodec, records: torch.Tensor, side: str) -> list[torch.Tensor]:
    """(scale, minimum), each `[H, P, G] float64`, as decoded."""
    return [part.double() for part in codec._groups(records.transpose(0, 1), side).decode()]


def check_affine(codec: PageCodec, k: torch.Tensor, v: torch.Tensor) -> None:
    pages, _, heads, dim = v.shape
    records, _ = codec.pack(k, v, first_has_sink=False)
    got_k, got_v = (side.double().unflatten(1, (pages, 64)) for side in codec.unpack(records))
    k, v = (side.permute(2, 0, 1, 3).double() for side in (k, v))  # [H, P, 64, D]

    scale, minimum = stored(codec, records, "k")
    levels = 2**codec.fmt.k_bits - 1
    assert (minimum <= k.amin(2)).all(), "the stored minimum is rounded down"
    assert (minimum + levels * scale >= k.amax(2)).all(), "the stored scale is rounded up"
    assert (scale <= tolerances.affine_scale(k.amin(2), k.amax(2), levels)).all(), "k: wasteful scale"
    assert ((got_k - k).abs() <= tolerances.affine_error(scale, minimum, levels).unsqueeze(2)).all()

    scale, minimum = stored(codec, records, "v")
    levels, block = 2**codec.fmt.v_bits - 1, block_size(dim)
    rotation = tolerances.forward_rotation_error(v, block)
    rotated = v @ sign_matrix(dim, torch.device("cpu")).double() / block**0.5
    low, high = rotated.amin(-1) - rotation, rotated.amax(-1) + rotation
    assert (minimum <= low + 2 * rotation).all()
    assert (minimum + levels * scale >= high - 2 * rotation).all()
    assert (scale <= tolerances.affine_scale(low, high, levels) + 4 * rotation.amax(-1, keepdim=True)).all(), (
        "v: wasteful scale"
    )
    error = got_v - v
    assert (error.abs() <= tolerances.rotated_error(scale, minimum, levels, block, rotation).unsqueeze(-1)).all()
    assert (error.norm(dim=-1) <= tolerances.rotated_norm_error(scale, minimum, levels, dim, rotation)).all()


@pytest.mark.parametrize("contents", CONTENTS)
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 32), (128, 128)], ids=str)
@pytest.mark.parametrize("fmt", LOSSY, ids=lambda fmt: fmt.name)
def test_errors_stay_within_half_a_stored_step(fmt, dims, contents):
    k, v = (make(contents, (3, 64, 2, dim), seed) for seed, dim in enumerate(dims))
    (check_int8 if fmt.kind == "int8" else check_affine)(PageCodec(fmt, *dims), k, v)


@pytest.mark.parametrize("fmt", AFFINE, ids=lambda fmt: fmt.name.split()[1])
def test_every_width_stays_within_half_a_stored_step(fmt):
    k, v = (make("outlier_channels", (2, 64, 2, 64), seed) for seed in (1, 2))
    check_affine(PageCodec(fmt, 64, 64), k, v)


@settings(max_examples=40, deadline=None)
@given(
    fmt=st.sampled_from([*LOSSY, *AFFINE]),
    pages=st.integers(1, 5),
    heads=st.integers(1, 4),
    k_dim=st.integers(1, 20).map(lambda n: 8 * n),
    v_dim=st.integers(1, 20).map(lambda n: 8 * n),
    contents=st.sampled_from(CONTENTS),
    seed=st.integers(0, 1000),
)
def test_any_shape_stays_within_half_a_stored_step(fmt, pages, heads, k_dim, v_dim, contents, seed):
    k, v = (make(contents, (pages, 64, heads, dim), seed + i) for i, dim in enumerate((k_dim, v_dim)))
    (check_int8 if fmt.kind == "int8" else check_affine)(PageCodec(fmt, k_dim, v_dim), k, v)


def test_constant_channels_of_k_are_exact():
    """A page whose channels all hold one and the same value has scale 0 and a bfloat16 minimum: nothing is lost."""
    codec = PageCodec(FORMATS["hq6"], 64, 64)
    for value in (0.0, -1.7, 3e30, 1e-30):
        page = torch.full((1, 64, 2, 64), value, dtype=torch.bfloat16)
        assert torch.equal(codec.unpack(codec.pack(page, page, first_has_sink=False)[0])[0], head_major(page).float())


def test_many_pages_use_many_tiles():
    """More V tokens than one tile of the inverse rotation, and not a multiple of it."""
    fmt = FORMATS["hq6"]
    pages = 2 * hadamard._TILE_TOKENS // 64 + 1
    check_affine(PageCodec(fmt, 8, 8), make("random", (pages, 64, 1, 8), 1), make("random", (pages, 64, 1, 8), 2))


# --- sinks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [(64, 64), (80, 96)], ids=str)
@pytest.mark.parametrize(
    "fmt", [FORMATS["hq6"], PageFormat("sink1", "affine", 3, 3, sink_tokens=1)], ids=lambda fmt: fmt.name
)
def test_sink_tokens_are_bit_exact_and_leave_no_trace(fmt, dims):
    codec, sinks = PageCodec(fmt, *dims), fmt.sink_tokens
    k, v = (make("random", (3, 64, 2, dim), seed) for seed, dim in enumerate(dims))
    wild_k, wild_v = k.clone(), v.clone()
    for wild in (wild_k, wild_v):
        wild[0, :sinks] = 1e4 * wild[0, :sinks]
        wild[0, 0, :, 0] = torch.inf
        wild[0, 0, :, 1] = -torch.nan
    records, sink = codec.pack(k, v, first_has_sink=True)
    wild_records, wild_sink = codec.pack(wild_k, wild_v, first_has_sink=True)
    assert torch.equal(records, wild_records), "sink tokens do not influence the page"
    assert not torch.equal(sink, wild_sink)

    for got, packed in zip(codec.unpack(wild_records, wild_sink), (wild_k, wild_v), strict=True):
        widened = (
            head_major(packed)[:, :sinks].contiguous().view(torch.int16).int() << 16
        )  # bfloat16 -> float32, by bits
        assert torch.equal(got[:, :sinks].contiguous().view(torch.int32), widened)
    for with_sink, without in zip(codec.unpack(records, sink), codec.unpack(records), strict=True):
        assert torch.equal(with_sink[:, sinks:], without[:, sinks:])
        assert without.isfinite().all()
    k_codes = codec._codes(records.transpose(0, 1), "k").unflatten(-1, (64, dims[0]))
    assert not k_codes[:, 0, :sinks].any(), "their codes are 0"
    assert k_codes[:, 1, :sinks].any()


def test_sink_tokens_are_left_out_of_the_statistics():
    """All values near 37: anything else in place of the sink tokens would widen the groups a hundredfold."""
    codec = PageCodec(FORMATS["hq6"], 64, 64)
    page = make("offset", (1, 64, 2, 64))
    records, _ = codec.pack(page, page, first_has_sink=True)
    packed = page.permute(2, 0, 1, 3).double()[:, :, 4:]  # [H, P, 60, D]
    scale, _ = stored(codec, records, "k")
    assert (scale <= tolerances.affine_scale(packed.amin(2), packed.amax(2), 63)).all()
    rotated = packed @ sign_matrix(64, torch.device("cpu")).double() / 8
    rotation = tolerances.forward_rotation_error(packed, 64)
    scale, _ = stored(codec, records, "v")
    bound = tolerances.affine_scale(rotated.amin(-1) - rotation, rotated.amax(-1) + rotation, 31)
    assert (scale[..., 4:] <= bound + 4 * rotation.amax(-1, keepdim=True)).all()
    minimum = stored(codec, records, "v")[1][..., 4:]
    assert (rotated.amin(-1) - minimum <= 0.05).all(), "range of the minima: 1/255 of their spread, not of 0 .. 37"


def test_only_the_first_page_of_a_sequence_has_a_sink():
    codec = PageCodec(FORMATS["hq6"], 64, 64)
    k, v = make("random", (2, 64, 2, 64), 1), make("random", (2, 64, 2, 64), 2)
    plain, none = codec.pack(k, v, first_has_sink=False)
    marked, sink = codec.pack(k, v, first_has_sink=True)
    assert none is None and list(sink.shape) == [2, codec.layout.sink_bytes]
    assert torch.equal(plain[1], marked[1])
    assert not torch.equal(plain[0], marked[0])


# --- outputs and inputs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_outputs_are_written_everywhere(fmt):
    codec = PageCodec(fmt, 80, 96)
    k, v = make("random", (5, 64, 3, 80), 1), make("random", (5, 64, 3, 96), 2)
    records, sink = codec.pack(k, v, first_has_sink=True)
    dtype = torch.bfloat16 if fmt.kind == "bf16" else torch.float32
    fresh = codec.unpack(records, sink)
    out = tuple(torch.full((3, 320, dim), torch.nan, dtype=dtype) for dim in (80, 96))
    filled = codec.unpack(records, sink, out=out)
    for one, two, given_out in zip(fresh, filled, out, strict=True):
        assert one.dtype == dtype and one.is_contiguous() and one.isfinite().all()
        assert two.data_ptr() == given_out.data_ptr()
        assert torch.equal(one, two)
    assert torch.equal(records, codec.pack(k, v, first_has_sink=True)[0]), "alignment gaps included"


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_pages_are_independent_and_records_may_be_any_view(fmt):
    """A page packs to the same bytes alone, in company, and is read back from any slice or permutation of an arena."""
    codec = PageCodec(fmt, 64, 64)
    k, v = make("random", (4, 64, 2, 64), 1), make("outlier_channels", (4, 64, 2, 64), 2)
    records, _ = codec.pack(k, v, first_has_sink=False)
    for page in range(4):
        assert torch.equal(
            codec.pack(k[page : page + 1], v[page : page + 1], first_has_sink=False)[0][0], records[page]
        )
    arena = torch.zeros(
        (9, 3, codec.layout.record_bytes + 3), dtype=torch.uint8
    )  # no stride or offset fits int64 words
    arena[1::2, 1:, 3:] = records
    whole = [side.unflatten(1, (4, 64)) for side in codec.unpack(records)]
    for side, expected in zip(codec.unpack(arena[1::2, 1:, 3:]), whole, strict=True):
        assert torch.equal(side, expected.flatten(1, 2))
    for side, expected in zip(codec.unpack(records[[2, 0]]), whole, strict=True):
        torch.testing.assert_close(side, expected[:, [2, 0]].flatten(1, 2), rtol=4 * tolerances.U, atol=0)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_no_pages(fmt):
    codec = PageCodec(fmt, 64, 80)
    records, sink = codec.pack(make("random", (0, 64, 3, 64)), make("random", (0, 64, 3, 80)), first_has_sink=False)
    assert list(records.shape) == [0, 3, codec.layout.record_bytes] and sink is None
    assert [list(side.shape) for side in codec.unpack(records)] == [[3, 0, 64], [3, 0, 80]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 2.0**113])
@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("fmt", LOSSY, ids=lambda fmt: fmt.name)
def test_lossy_formats_refuse_what_they_cannot_hold(fmt, side, bad):
    pages = {"k": make("random", (2, 64, 2, 64), 1), "v": make("random", (2, 64, 2, 64), 2)}
    pages[side][1, 63, 1, 63] = bad
    with pytest.raises(NonFiniteError, match=f"{side} holds.*dense"):
        PageCodec(fmt, 64, 64).pack(**pages, first_has_sink=False)


def test_wrong_inputs_are_named():
    codec = PageCodec(FORMATS["hq6"], 64, 64)
    k = make("random", (1, 64, 2, 64))
    for bad_k, bad_v, said in [
        (k[:, :63], k, r"k has shape \[1, 63, 2, 64\]"),
        (k, k[..., :32], r"v has shape \[1, 64, 2, 32\]"),
        (k[0], k, "k has shape"),
        (k.float(), k, "k is torch.float32"),
        (k, k.half(), "v is torch.float16"),
        (k, k[:, :, :1], "differ in pages or heads"),
    ]:
        with pytest.raises(ValueError, match=said):
            codec.pack(bad_k, bad_v, first_has_sink=False)
    with pytest.raises(ValueError, match="no page to take sink tokens from"):
        codec.pack(k[:0], k[:0], first_has_sink=True)

    records, sink = codec.pack(k, k, first_has_sink=True)
    for bad_records, bad_sink, said in [
        (records[..., :-16], None, "records are"),
        (records.to(torch.int16), None, "records are"),
        (records[0], None, "records are"),
        (records, sink[:1], "sink is"),
        (records, sink.float(), "sink is"),
        (records[:0], sink, "no page it could begin"),
    ]:
        with pytest.raises(ValueError, match=said):
            codec.unpack(bad_records, bad_sink)
    with pytest.raises(ValueError, match="int8 keeps no sink"):
        int8 = PageCodec(FORMATS["int8"], 64, 64)
        int8.unpack(int8.pack(k, k, first_has_sink=True)[0], sink)
    good = codec.unpack(records)
    for bad_out in [(good[0].bfloat16(), good[1]), (good[0], good[1][:, :10]), (good[0].transpose(1, 2), good[1])]:
        with pytest.raises(ValueError, match="out [kv] is"):
            codec.unpack(records, out=bad_out)
