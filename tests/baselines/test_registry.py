"""Every reference format: its name, its stored bytes against its stated bits, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from sgl_hq.baselines import BASELINES
from sgl_hq.kernels.page_codec import NonFiniteError

NAMES = {
    "int4_sym_g32", "int4_affine_g32", "affine_seven_level_3bit_g64_meta4", "affine_seven_level_3bit_g32",
    "hadamard_affine_four_level_2bit_g64_meta8", "hadamard_affine_four_level_2bit_g32",
    "sink1_channelwise_four_level_2bit", "kivi2", "kivi3", "kivi4", "turbo2", "turbo3", "turbo4", "turbo2_qjl",
    "turbo3_qjl", "turbo4_qjl", "rotor3", "iso2", "planar3", "nf4", "mxfp4", "nvfp4", "fp8_e4m3", "fp8_e4m3_amax",
}  # fmt: skip
# Bits per value at head_dim 64 and 128 and 1,024 tokens, by hand: codes + metadata / group.
STATED_BITS = {
    "int4_sym_g32": (4.5, 4.5),
    "int4_affine_g32": (5.0, 5.0),
    "affine_seven_level_3bit_g64_meta4": (3.125 + 1 / 1024, 3.125 + 1 / 1024),
    "affine_seven_level_3bit_g32": (4.0, 4.0),
    "hadamard_affine_four_level_2bit_g64_meta8": (2.25 + 1 / 1024, 2.25 + 1 / 1024),
    "hadamard_affine_four_level_2bit_g32": (3.0, 3.0),
    "sink1_channelwise_four_level_2bit": (2 + 30 / 1024, 2 + 30 / 1024),
    "kivi2": (2.5, 2 + (32 / 64 + 32 / 128) / 2),
    "kivi3": (3.5, 3 + (32 / 64 + 32 / 128) / 2),
    "kivi4": (4.5, 4 + (32 / 64 + 32 / 128) / 2),
    "turbo2": (2.25, 2.125),
    "turbo3": (3.25, 3.125),
    "turbo4": (4.25, 4.125),
    "turbo2_qjl": (2.375, 2.1875),  # K has a second norm
    "turbo3_qjl": (3.375, 3.1875),
    "turbo4_qjl": (4.375, 4.1875),
    "rotor3": (3 * 66 / 64 + 16 / 64, 3 * 129 / 128 + 16 / 128),  # 22 and 43 blocks of 3
    "iso2": (2.25, 2.125),
    "planar3": (3.25, 3.125),
    "nf4": (4.25, 4.25),
    "mxfp4": (4.25, 4.25),
    "nvfp4": (4.5, 4.5),
    "fp8_e4m3": (8.0, 8.0),
    "fp8_e4m3_amax": (8.0, 8.0),
}
EXTRA_BYTES = {"nvfp4": 8, "fp8_e4m3_amax": 8}  # one float32 per side, whatever the size


def test_the_registry_is_complete():
    assert set(BASELINES) == NAMES == set(STATED_BITS)
    assert [make().name for make in BASELINES.values()] == list(BASELINES)


@pytest.mark.parametrize("name", sorted(NAMES))
@pytest.mark.parametrize("column, dim", [(0, 64), (1, 128)])
def test_stored_bytes_are_the_stated_bits(random_prefix, name, column, dim):
    codec = BASELINES[name]()
    bits = codec.effective_bits_per_dim(dim, dim, 1024)
    assert bits == pytest.approx(STATED_BITS[name][column], abs=1e-12)
    k, v = (random_prefix("random", 1024, 3, dim, seed) for seed in (0, 1))
    packed = codec.pack(0, k, v)
    assert packed.tokens == 1024
    assert packed.nbytes - EXTRA_BYTES.get(name, 0) == pytest.approx(bits / 8 * 2 * k.numel(), abs=1e-6)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_unpack_restores_each_side_in_its_place(random_prefix, name):
    """Any format here keeps a random vector's direction; K and V exchanged, or heads and tokens mixed, would not."""
    k, v = (random_prefix("random", 192, 3, 64, seed) for seed in (0, 1))
    codec = BASELINES[name]()
    for x, restored in zip((k, v), codec.unpack(7, codec.pack(7, k, v)), strict=True):
        assert restored.shape == (3, 192, 64) and restored.dtype == torch.float32
        alike = torch.cosine_similarity(x.transpose(0, 1).float(), restored, dim=-1)
        assert alike.min() > 0.5  # unrelated directions of 64 dimensions: 0 +- 1/8


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_kivi_scales_keys_by_channel_and_values_by_token(random_prefix, bits):
    """So keys that differ only between channels of a page, and values only between tokens, lose nothing."""
    x = random_prefix("random")
    k = x.unflatten(0, (-1, 64))[:, :1].expand(-1, 64, -1, -1).flatten(0, 1)
    v = x[..., :1].expand_as(x)
    codec = BASELINES[f"kivi{bits}"]()
    for side, restored in zip((k, v), codec.unpack(0, codec.pack(0, k, v)), strict=True):
        assert torch.equal(restored, side.transpose(0, 1).to(torch.float16).float())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_qjl_is_on_keys_only(random_prefix, bits):
    x = random_prefix("random")
    plain, qjl = (BASELINES[name]().pack(0, x, x) for name in (f"turbo{bits}", f"turbo{bits}_qjl"))
    plain_v, qjl_v = plain.tensors[plain.k_parts :], qjl.tensors[qjl.k_parts :]
    assert all(torch.equal(a, b) for a, b in zip(plain_v, qjl_v, strict=True))
    assert qjl.nbytes - plain.nbytes == 2 * 128 * 2  # one more float16 per token and head


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_zero_prefix(random_prefix, name):
    zero = random_prefix("zero")
    for restored in BASELINES[name]().unpack(0, BASELINES[name]().pack(0, zero, zero)):
        assert (restored == 0).all()


@pytest.mark.parametrize("name", sorted(NAMES))
def test_refusals(random_prefix, name):
    codec, k = BASELINES[name](), random_prefix("random")
    with pytest.raises(ValueError, match="equal shapes"):
        codec.pack(0, k, random_prefix("random", dim=128))
    with pytest.raises(ValueError, match="multiples of 64"):
        codec.pack(0, k[:100], k[:100])
    with pytest.raises(ValueError, match="multiples of 64"):
        codec.pack(0, k[..., :48], k[..., :48])
    with pytest.raises(ValueError, match="must be equal"):
        codec.effective_bits_per_dim(64, 128, 1024)
    k[5, 1, 7] = torch.nan
    with pytest.raises(NonFiniteError):
        codec.pack(0, k, k)


def test_metadata_that_overflows_float16_is_refused(random_prefix):
    huge = random_prefix("random") * 1e6
    with pytest.raises(ValueError, match="keep this prefix dense"):
        BASELINES["int4_sym_g32"]().pack(0, huge, huge)


# --- the published figures of the MegaQuant points: one T gives all of them; head_dim 64 or 128 gives the same ---
PUBLISHED = {
    "sink1_channelwise_four_level_2bit": "2.162",
    "hadamard_affine_four_level_2bit_g64_meta8": "2.255",
    "hadamard_affine_four_level_2bit_g32": "3.000",
    "affine_seven_level_3bit_g64_meta4": "3.130",
    "affine_seven_level_3bit_g32": "4.000",
}
PUBLISHED_TOKENS = 185


def reproduced(dim: int, tokens: int) -> dict[str, str]:
    return {name: f"{BASELINES[name]().effective_bits_per_dim(dim, dim, tokens):.3f}" for name in PUBLISHED}


@pytest.mark.parametrize("dim", [64, 128])
def test_the_published_effective_bits_to_the_last_digit(dim):
    assert [tokens for tokens in range(1, 4097) if reproduced(dim, tokens) == PUBLISHED] == [PUBLISHED_TOKENS]


def test_the_other_end_of_the_published_range():
    """3.126250: README of CrazyAngelm/megaquant-rag-compress, 800 vectors of 256 dimensions."""
    bits = BASELINES["affine_seven_level_3bit_g64_meta4"]().effective_bits_per_dim(256, 256, 800)
    assert f"{bits:.6f}" == "3.126250"


def test_the_published_int4_ratios():
    codecs = [BASELINES[name]() for name in ("int4_sym_g32", "int4_affine_g32")]
    assert [f"{16 / codec.effective_bits_per_dim(64, 64, 1024):.2f}" for codec in codecs] == ["3.56", "3.20"]
