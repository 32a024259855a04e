"""Triton kernels against the PyTorch codec, on a GPU or, with device "cpu", under Triton's interpreter.

Every buffer is poisoned first: dense pages that are not asked for are NaN, bytes that must be written are 0xFF or NaN,
and what must stay untouched is compared with 0xFF afterwards.
"""

from __future__ import annotations

import torch
from page_samples import make

from sgl_hq.kernels.page_codec import PageCodec, UnpackablePageError
from sgl_hq.kernels.page_codec.launcher import pack_pages, unpack_pages
from sgl_hq.page_format import get_format

SPARE = 2  # pages of the pool and of the arena that nobody asks for


def poisoned(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """0xFF bytes: NaN as a bfloat16."""
    return torch.full((*shape,), 255, dtype=torch.uint8, device=device) if dtype == torch.uint8 else (
        poisoned(*shape[:-1], shape[-1] * dtype.itemsize, device=device).view(dtype)
    )  # fmt: skip


class Case:
    """Dense pages of all layers scattered over a pool, and an arena to hold their records."""

    def __init__(
        self, name: str, dims: tuple[int, int], contents: str, *, device: str = "cpu", pages: int = 3, heads: int = 2,
        layers: int = 2, first_has_sink: bool = True, index_dtype: torch.dtype = torch.int64,
    ) -> None:  # fmt: skip
        self.codec = PageCodec(get_format(name), *dims)
        self.layout, self.device = self.codec.layout, device
        self.first_has_sink = first_has_sink
        draw = torch.Generator().manual_seed(pages + heads)
        total = pages + SPARE
        order = torch.randperm(total, generator=draw)[:pages], torch.randperm(total, generator=draw)[:pages]
        self.dense_pages, self.packed_pages = (pages.to(device, index_dtype) for pages in order)
        self.spare = [page for page in range(total) if page not in order[1].tolist()]
        self.dense = [
            [make(contents, (pages, 64, heads, dim), seed=2 * layer + side) for layer in range(layers)]
            for side, dim in enumerate(dims)
        ]
        self.records = poisoned(layers, total, heads, self.layout.record_bytes, device=device)
        self.sinks = poisoned(layers, 3, heads, self.layout.sink_bytes, device=device)

    def pool(self, side: int) -> list[torch.Tensor]:
        """One `[slots, H, D] bfloat16` per layer; NaN but for the case's pages."""
        layers = []
        for pages in self.dense[side]:
            pool = poisoned(len(pages) + SPARE, *pages.shape[1:], dtype=torch.bfloat16)
            pool[self.dense_pages.cpu()] = pages
            layers.append(pool.flatten(0, 1).to(self.device))
        return layers

    def expected(self, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        k, v = self.dense[0][layer], self.dense[1][layer]
        return self.codec.pack(k, v, first_has_sink=self.first_has_sink and len(k) > 0)

    def pack(self) -> torch.Tensor:
        return pack_pages(
            self.layout, self.pool(0), self.pool(1), self.dense_pages, self.records, self.packed_pages,
            self.sinks if self.layout.sink_bytes else None, 1 if self.first_has_sink else -1,
        )  # fmt: skip


def check_pack(*args, **options) -> None:
    """Records and sinks byte for byte, and nothing else written."""
    case = Case(*args, **options)
    status = case.pack()
    assert status.dtype == torch.int32 and status.tolist() == [0] * len(case.packed_pages)
    for layer in range(len(case.records)):
        expected, sink = case.expected(layer)
        got = case.records[layer, case.packed_pages.long()].cpu()
        for field in case.layout.fields:
            differ = (got != expected)[..., field.offset : field.end]
            assert not differ.any(), f"layer {layer}, field {field.name}: {differ.sum()} of {differ.numel()} bytes"
        assert torch.equal(got, expected), "an alignment gap is not zero"
        if sink is not None:
            assert torch.equal(case.sinks[layer, 1].cpu(), sink)
    assert (case.records[:, case.spare] == 255).all(), "wrote into a page that is not its own"
    untouched = case.sinks[:, ::2] if case.first_has_sink else case.sinks
    assert (untouched == 255).all(), "wrote into a sink slot that is not its own"


def check_unpack(*args, all_layers: bool = True, **options) -> None:
    """The reference's float32, rounded to bfloat16, bit for bit."""
    case = Case(*args, **options)
    sinks, expected = None, []
    for layer in range(len(case.records)):
        records, sink = case.expected(layer)
        case.records[layer, case.packed_pages.long()] = records.to(case.device)
        if sink is not None:
            case.sinks[layer, 1] = sink.to(case.device)
            sinks = case.sinks[:, 1]
        expected.append([side.transpose(0, 1).bfloat16() for side in case.codec.unpack(records, sink)])
    tokens, heads = 64 * len(case.packed_pages), case.records.shape[2]
    dims = case.layout.head_dim, case.layout.v_head_dim
    outs = [poisoned(len(case.records), tokens, heads, d, device=case.device, dtype=torch.bfloat16) for d in dims]
    if all_layers:
        unpack_pages(case.layout, case.records, case.packed_pages, sinks, *outs)
    else:
        for layer in range(len(case.records)):
            sink = None if sinks is None else sinks[layer]
            unpack_pages(case.layout, case.records[layer], case.packed_pages, sink, *(out[layer] for out in outs))
    for layer, sides in enumerate(expected):
        for name, out, side in zip("kv", outs, sides, strict=True):
            differ = out[layer].cpu().view(torch.int16) != side.contiguous().view(torch.int16)
            assert not differ.any(), f"layer {layer}, {name}: {differ.sum()} of {differ.numel()} values"


def check_refused(name: str, bad: float, side: int, *, device: str = "cpu") -> None:
    """Only the page that holds `bad` is flagged; the others are packed as if it were not there."""
    case = Case(name, (64, 64), "random", device=device, first_has_sink=False)
    case.dense[side][1][1, 63, 1, 63] = bad
    assert case.pack().tolist() == [0, 1, 0]
    for layer, good in ((0, [0, 1, 2]), (1, [0, 2])):
        k, v = (case.dense[side][layer][good] for side in (0, 1))
        expected, _ = case.codec.pack(k, v, first_has_sink=False)
        assert torch.equal(case.records[layer, case.packed_pages.long()[good]].cpu(), expected)
    try:
        case.expected(1)
    except UnpackablePageError:
        return
    raise AssertionError("the reference packs what the kernel refuses")


def check_sink_tokens_may_hold_anything(name: str, *, device: str = "cpu") -> None:
    case = Case(name, (64, 64), "random", device=device)
    for side in case.dense:
        for pages in side:
            pages[0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e38])[:, None, None]
    assert not case.pack().any()
    for layer in range(2):
        expected, sink = case.expected(layer)
        assert torch.equal(case.records[layer, case.packed_pages.long()].cpu(), expected)
        assert torch.equal(case.sinks[layer, 1].cpu(), sink)


def check_escapes(
    dims: tuple[int, int], k_escapes: int, v_escapes: int, *, device: str = "cpu", pages: int = 2
) -> None:
    """Lossless pages with this many escapes a page and head, at random places with random bits: packed and restored, or
    flagged."""
    case = Case("lossless", dims, "constant", device=device, pages=pages, first_has_sink=False)
    draw = torch.Generator().manual_seed(k_escapes + v_escapes)
    for side, count in zip(case.dense, (k_escapes, v_escapes), strict=True):
        for layer in side:
            rows = layer.transpose(1, 2).reshape(-1, 64 * layer.shape[3]).view(torch.int16)  # a page and head each
            for row in rows:
                places = torch.randperm(len(row), generator=draw)[:count]
                exponents = torch.tensor([0, 1, 90, 255])[torch.randint(0, 4, (count,), generator=draw)]
                row[places] = (torch.randint(-32768, 32768, (count,), generator=draw) & -0x7F81 | exponents << 7).to(
                    torch.int16
                )
            layer.copy_(rows.view(torch.bfloat16).view(pages, -1, 64, layer.shape[3]).transpose(1, 2))
    status = case.pack()
    fits = k_escapes + v_escapes <= case.layout.escape_budget and max(k_escapes, v_escapes) <= 255
    assert status.tolist() == [0 if fits else 1] * pages
    assert (case.records[:, case.spare] == 255).all()
    if not fits:
        return
    out = [poisoned(2, 64 * pages, 2, dim, device=device, dtype=torch.bfloat16) for dim in dims]
    unpack_pages(case.layout, case.records, case.packed_pages, None, *out)
    for layer in range(2):
        assert torch.equal(case.records[layer, case.packed_pages.long()].cpu(), case.expected(layer)[0])
        for got, side in zip(out, case.dense, strict=True):
            assert torch.equal(got[layer].cpu().view(torch.int16), side[layer].flatten(0, 1).view(torch.int16))


def check_arena_slices(*, device: str = "cpu") -> None:
    """Records and sinks may be slices of larger arenas; without pages nothing is read or written."""
    case = Case("hq6", (64, 64), "random", device=device)
    case.records = poisoned(4, len(case.packed_pages) + SPARE, 5, case.layout.record_bytes, device=device)[1:3, :, 2:4]
    assert not case.pack().any()
    for layer in range(2):
        assert torch.equal(case.records[layer, case.packed_pages.long()].cpu(), case.expected(layer)[0])
    before, none = case.records.clone(), case.dense_pages[:0]
    status = pack_pages(case.layout, case.pool(0), case.pool(1), none, case.records, none, case.sinks, 1)
    assert status.shape == (0,)
    nothing = torch.empty(2, 0, 2, 64, dtype=torch.bfloat16, device=device)
    unpack_pages(case.layout, case.records, none, None, nothing, nothing)
    assert torch.equal(case.records, before)


def check_wrong_inputs(*, device: str = "cpu") -> None:
    case = Case("hq6", (64, 80), "random", device=device)
    k, v = case.pool(0), case.pool(1)
    shifted = poisoned(*case.records.shape[:3], case.layout.record_bytes + 8, device=device)[..., 8:]
    good = {
        "k_layers": k, "v_layers": v, "dense_pages": case.dense_pages, "records": case.records,
        "packed_pages": case.packed_pages, "sink_slots": case.sinks, "sink_slot": 0,
    }  # fmt: skip
    for name, bad, said in [
        ("k_layers", v, "k is"),
        ("v_layers", [layer.float() for layer in v], "v is"),
        ("v_layers", [layer.transpose(0, 1).contiguous().transpose(0, 1) for layer in v], "contiguous"),
        ("k_layers", k[:1], "1 layers of k"),
        ("dense_pages", case.dense_pages[:1], "1 dense pages for 3"),
        ("dense_pages", case.dense_pages.float(), "dense_pages is"),
        ("records", case.records[..., :-16], "records are"),
        ("records", case.records.flatten(0, 1), "records are"),
        ("records", shifted, "16 bytes"),
        ("packed_pages", case.packed_pages.bool(), "packed_pages is"),
        ("sink_slots", None, "sink_slots is missing"),
        ("sink_slots", case.sinks[:, :, :1], "sink_slots is"),
    ]:
        _refuses(said, pack_pages, case.layout, **good | {name: bad})
    out = [poisoned(2, 192, 2, dim, device=device, dtype=torch.bfloat16) for dim in (64, 80)]
    _refuses("v_out is", unpack_pages, case.layout, case.records, case.packed_pages, None, out[0], out[0])
    _refuses("sink is", unpack_pages, case.layout, case.records, case.packed_pages, case.sinks, *out)
    int8 = PageCodec(get_format("int8"), 64, 80).layout
    records = poisoned(2, 5, 2, int8.record_bytes, device=device)
    _refuses("int8 keeps no sink", unpack_pages, int8, records, case.packed_pages, case.sinks[:, 0], *out)


def _refuses(said: str, call, *args, **options) -> None:
    try:
        call(*args, **options)
    except ValueError as error:
        assert said in str(error), f"{said!r} is not in {error}"
    else:
        raise AssertionError(f"nothing refused: {said}")
