"""Bugs that other servers have had with packed pages and their scales, asked of the packed tier."""

from __future__ import annotations

import pytest
import torch

from sgl_hq.layer_codecs import layer_codecs
from sgl_hq.page_format import PAGE_TOKENS as P
from sgl_hq.pool.packed_tier import PackedTier
from sgl_hq.pool.sizing import KVShape, TierSizes

SHAPE = KVShape(layers=2, kv_heads=3, head_dim=64, v_head_dim=64)
FORMATS = ["bf16", "lossless", "int8", "hq6", "hq4", "hq2"]


def _dense(pages, seed=0):
    g = torch.Generator().manual_seed(seed)
    make = lambda: [torch.randn(pages * P, SHAPE.kv_heads, 64, generator=g).bfloat16() for _ in range(SHAPE.layers)]
    return make(), make()


def _tier(name) -> PackedTier:
    codecs = layer_codecs(name, SHAPE.layers, SHAPE.head_dim, SHAPE.v_head_dim)
    return PackedTier(codecs, SHAPE, TierSizes(0, 8, 2 if codecs[0].fmt.sink_tokens else 0), "cpu")


def _read(tier, pages) -> list[torch.Tensor]:
    return [part.clone() for layer in range(SHAPE.layers) for part in tier.read(layer, torch.tensor(pages), pages[0])]


@pytest.mark.parametrize("name", FORMATS)
def test_vllm_49716_strides_are_not_shapes(name):
    """vLLM #49716: scales were found through the tensor's shape where pages were padded: 320 of 384 were another page's.

    Here records and sinks lie in padded memory, and K and V are views of a wider buffer, as SGLang's fused pools have them.
    """
    k, v = _dense(4)
    slots = torch.arange(4 * P)
    plain, padded = _tier(name), _tier(name)
    for layer in range(SHAPE.layers):
        for held in (padded.records, padded.sink_slots):
            pages, heads, size = held[layer].shape
            held[layer] = torch.full((pages, heads + 1, size + 24), 0xA5, dtype=torch.uint8)[:, :heads, :size]
    wide = [torch.cat([a, a.new_full(a.shape, 7.0), b], dim=2) for a, b in zip(k, v)]
    wide_k, wide_v = [w[:, :, :64] for w in wide], [w[:, :, 128:] for w in wide]
    assert not wide_k[0].is_contiguous() and not padded.records[0].is_contiguous()

    expected = _read(plain, plain.write(k, v, slots, starts_sequence=True).pages)
    got = _read(padded, padded.write(wide_k, wide_v, slots, starts_sequence=True).pages)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("name", FORMATS)
def test_vllm_51091_later_batches_leave_the_scales_of_earlier_pages(name):
    """vLLM #51091: the scales of pages written before were wiped by the first batch that ran."""
    tier = _tier(name)
    first = tier.write(*_dense(2, seed=1), torch.arange(2 * P), starts_sequence=True).pages
    records = [r[first].clone() for r in tier.records]
    expected = _read(tier, first)
    for seed in (2, 3):
        later = tier.write(*_dense(3, seed), torch.arange(3 * P), starts_sequence=True).pages
        _read(tier, later)
        tier.free(later)
        assert all(torch.equal(r[first], before) for r, before in zip(tier.records, records))
        assert all(map(torch.equal, _read(tier, first), expected))


def test_vllm_38479_every_width_is_the_one_asked_for():
    """vLLM #38479: kernels had 2 bits built in, whatever was asked for. (VeloxQuant #162: groups of one token were exact,
    so quality looked free.) Each width costs its bits and errs about half as much as the next smaller one, none by nothing."""
    k, v = _dense(4)
    slots, errors = torch.arange(4 * P), []
    for bits in range(2, 9):
        tier = _tier(f"K{bits}V{bits}")
        codes_bytes = 2 * P * SHAPE.head_dim * bits // 8
        assert codes_bytes < tier.codecs[0].layout.record_bytes < codes_bytes + 2 * P * SHAPE.head_dim // 4
        got_k, got_v = tier.read(0, torch.tensor(pages := tier.write(k, v, slots, True).pages), pages[0])
        errors.append([float((g.transpose(0, 1) - d[0]).square().mean().sqrt()) for g, d in ((got_k, k), (got_v, v))])
    for coarse, fine in zip(errors, errors[1:]):
        for of_coarse, of_fine in zip(coarse, fine):
            assert 0 < of_fine < 0.7 * of_coarse
