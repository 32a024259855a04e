"""HQCache as a transformers user meets it, and the page codec behind it."""

from __future__ import annotations

import copy

import pytest
import torch

from sgl_hq.gate.codecs import codec_of
from sgl_hq.hq_cache import HQCache
from sgl_hq.kernels.page_codec import PageCodec
from sgl_hq.page_format import get_format
from sgl_hq.prefix_codec import ServedCodec

IDS = torch.randint(0, 256, (2, 200), generator=torch.Generator().manual_seed(5))


def pages(tokens: int, heads: int = 2, dim: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return tuple(torch.randn(tokens, heads, dim, generator=generator).bfloat16() for _ in range(2))


def prefilled(model, fmt: str, tokens: int = 150, rows: int = 1) -> HQCache:
    cache = HQCache(fmt)
    with torch.inference_mode():
        model(input_ids=IDS[:rows, :tokens], past_key_values=cache)
    return cache


def test_only_whole_pages_are_packed_and_only_once(loaded):
    cache = prefilled(loaded.model, "hq4")
    dense = copy.deepcopy(cache)
    assert (cache.packed_tokens, cache.get_seq_length(), cache.packed_bytes) == (0, 150, 0)
    assert cache.pack() == 128 and cache.get_seq_length() == 150 and cache.layers[0].keys.shape[2] == 22
    first = [layer.rows[0][0] for layer in cache.layers]
    assert cache.pack() == 128 and [layer.rows[0][0] for layer in cache.layers] == first
    with torch.inference_mode():
        loaded.model(input_ids=IDS[:1, 150:192], past_key_values=cache)
    assert cache.pack() == 192 and all(layer.rows[0][0] is run for layer, run in zip(cache.layers, first))
    assert dense.packed_tokens == 0 and dense.get_seq_length() == 150, "a copy goes its own way"
    expected = PageCodec(get_format("hq4"), 16).layout
    assert cache.packed_bytes == 2 * 2 * (3 * expected.record_bytes + expected.sink_bytes)


def test_what_attention_reads_is_the_unpacked_prefix_and_the_dense_rest(loaded):
    cache = prefilled(loaded.model, "hq4")
    k, v = cache.layers[1].keys, cache.layers[1].values
    cache.pack()
    new = torch.randn(1, 2, 3, 16)
    got_k, got_v = cache.update(new, new, 1)
    codec = codec_of("hq4")
    want_k, want_v = codec.unpack(1, codec.pack(1, k[0, :, :128].transpose(0, 1), v[0, :, :128].transpose(0, 1)))
    for got, want, dense in ((got_k, want_k, k), (got_v, want_v, v)):
        assert got.dtype == torch.float32 and got.shape[2] == 153
        assert torch.equal(got[0, :, :128], want) and torch.equal(got[0, :, 128:150], dense[0, :, 128:].float())
        assert torch.equal(got[:, :, 150:], new.bfloat16().float())


def test_generate_with_copies_of_one_packed_prefix(loaded):
    """bf16 pages restore every bit: generation must equal that of a dense cache, row by row."""
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 256}
    packed = prefilled(loaded.model, "bf16", rows=2)
    dense = copy.deepcopy(packed)
    packed.pack()
    answers = [loaded.model.generate(IDS[:, :170], past_key_values=copy.deepcopy(packed), **options) for _ in range(2)]
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], loaded.model.generate(IDS[:, :170], past_key_values=dense, **options))
    assert packed.get_seq_length() == 150, "the original is as it was"


def test_batch_operations(loaded):
    cache = prefilled(loaded.model, "hq6", rows=2)
    cache.pack()
    swapped, twice = copy.deepcopy(cache), copy.deepcopy(cache)
    swapped.reorder_cache(torch.tensor([1, 0]))
    twice.batch_repeat_interleave(2)
    nothing = torch.zeros(2, 2, 0, 16)
    k, _ = copy.deepcopy(cache).update(nothing, nothing, 0)
    assert torch.equal(swapped.update(nothing, nothing, 0)[0], k.flip(0))
    assert torch.equal(twice.update(nothing[:1].expand(4, -1, -1, -1), nothing[:1].expand(4, -1, -1, -1), 0)[0], k.repeat_interleave(2, 0))
    cache.crop(-10)
    assert cache.get_seq_length() == 140
    with pytest.raises(ValueError, match="the first 128 are packed"):
        cache.crop(100)
    cache.reset()
    assert cache.get_seq_length() == 0


def test_a_codec_of_the_whole_prefix_packs_once(loaded):
    cache = prefilled(loaded.model, "hq4", tokens=64)
    whole = HQCache(codec_of("int4_sym_g32"))
    for index, layer in enumerate(cache.layers):
        whole.update(torch.randn(1, 2, 64, 64), torch.randn(1, 2, 64, 64), index)
    whole.pack()
    whole.update(torch.randn(1, 2, 64, 64), torch.randn(1, 2, 64, 64), 0)
    with pytest.raises(ValueError, match="whole prefix at once"):
        whole.layers[0].pack()


def test_an_unknown_format():
    with pytest.raises(ValueError, match="unknown page format 'hq66'"):
        HQCache("hq66")


# --- ServedCodec: refused pages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [(0,), (2,), (0, 3), (0, 1, 2, 3)], ids=str)
def test_refused_pages_stay_as_they_are_and_count_16_bits(bad):
    codec, layout = ServedCodec(get_format("hq6")), get_format("hq6").layout(16)
    k, v = pages(256)
    for page in bad:
        v[page * 64 + 7, 1, 3] = float("inf")
    packed = codec.pack(0, k, v)
    got_k, got_v = codec.unpack(0, packed)
    want_k, want_v = pages(256)
    good_k, good_v = codec.unpack(0, codec.pack(0, want_k, want_v))
    for page in range(4):
        where = slice(page * 64, page * 64 + 64)
        if page in bad:
            assert torch.equal(got_k[:, where], k[where].transpose(0, 1).float()) and torch.equal(got_v[:, where], v[where].transpose(0, 1).float())
        else:
            assert torch.equal(got_k[:, where], good_k[:, where]) and torch.equal(got_v[:, where], good_v[:, where])
    records = 2 * ((4 - len(bad)) * layout.record_bytes + (0 in bad or layout.sink_bytes) * (0 not in bad))
    assert packed.nbytes == records + len(bad) * (2 * layout.dense_bytes + 4)


def test_pages_that_continue_a_sequence_have_no_sinks():
    codec = ServedCodec(get_format("hq6"))
    k, v = pages(128)
    whole = codec.pack(0, k, v)
    parts = [codec.pack(0, k[:64], v[:64]), codec.pack(0, k[64:], v[64:], begins_sequence=False)]
    assert sum(part.nbytes for part in parts) == whole.nbytes
    for side in (0, 1):
        assert torch.equal(torch.cat([codec.unpack(0, part)[side] for part in parts], 1), codec.unpack(0, whole)[side])


def test_lossless_pages_keep_every_bit_also_when_refused():
    codec = ServedCodec(get_format("lossless"))
    k, v = pages(128)
    k[:64] *= torch.logspace(-30, 30, 64 * 32, base=2).view(64, 2, 16).bfloat16()  # exponents all over: no room for escapes
    packed = codec.pack(0, k, v)
    assert len(packed.tensors[2]) == 1
    got_k, got_v = codec.unpack(0, packed)
    assert torch.equal(got_k, k.transpose(0, 1)) and torch.equal(got_v, v.transpose(0, 1)) and got_k.dtype == torch.bfloat16
