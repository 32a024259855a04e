"""What holds for pages of every format: shapes, dtypes, buffers, views, refusals. `bf16` itself."""

from __future__ import annotations

import pytest
import tolerances
import torch
from page_samples import head_major, make

from sgl_hq.kernels.page_codec import NonFiniteError, PageCodec, UnpackablePageError
from sgl_hq.page_format import FORMATS, get_format

EVERY_KIND = [*FORMATS.values(), get_format("K6tV5"), get_format("sink4-K3tV3")]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_the_poison_works():
    assert torch.empty(3).isnan().all()
    assert torch.empty(3, dtype=torch.bfloat16).isnan().all()


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


@pytest.mark.parametrize("fmt", EVERY_KIND, ids=lambda fmt: fmt.name)
def test_outputs_are_written_everywhere(fmt):
    codec = PageCodec(fmt, 80, 96)
    k, v = make("random", (5, 64, 3, 80), 1), make("random", (5, 64, 3, 96), 2)
    records, sink = codec.pack(k, v, first_has_sink=True)
    dtype = torch.bfloat16 if fmt.kind in ("bf16", "lossless") else torch.float32
    fresh = codec.unpack(records, sink)
    out = tuple(torch.full((3, 320, dim), torch.nan, dtype=dtype) for dim in (80, 96))
    filled = codec.unpack(records, sink, out=out)
    for one, two, given_out in zip(fresh, filled, out, strict=True):
        assert one.dtype == dtype and one.is_contiguous() and one.isfinite().all()
        assert two.data_ptr() == given_out.data_ptr()
        assert torch.equal(one, two)
    assert torch.equal(records, codec.pack(k, v, first_has_sink=True)[0]), "alignment gaps included"


@pytest.mark.parametrize("fmt", EVERY_KIND, ids=lambda fmt: fmt.name)
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


@pytest.mark.parametrize("fmt", EVERY_KIND, ids=lambda fmt: fmt.name)
def test_no_pages(fmt):
    codec = PageCodec(fmt, 64, 80)
    records, sink = codec.pack(make("random", (0, 64, 3, 64)), make("random", (0, 64, 3, 80)), first_has_sink=False)
    assert list(records.shape) == [0, 3, codec.layout.record_bytes] and sink is None
    assert [list(side.shape) for side in codec.unpack(records)] == [[3, 0, 64], [3, 0, 80]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 2.0**113])
@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("fmt", [fmt for fmt in EVERY_KIND if fmt.lossy], ids=lambda fmt: fmt.name)
def test_lossy_formats_refuse_what_they_cannot_hold(fmt, side, bad):
    pages = {"k": make("random", (2, 64, 2, 64), 1), "v": make("random", (2, 64, 2, 64), 2)}
    pages[side][1, 63, 1, 63] = bad
    with pytest.raises(NonFiniteError, match=f"{side} holds.*dense") as refusal:
        PageCodec(fmt, 64, 64).pack(**pages, first_has_sink=False)
    assert isinstance(refusal.value, UnpackablePageError), "what callers catch"


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
