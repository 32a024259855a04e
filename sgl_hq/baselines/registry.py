"""Every reference format by name: what K and V of a prefix are packed with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from sgl_hq.page_format import PAGE_TOKENS
from sgl_hq.prefix_codec import PrefixCodec

from .affine import Affine, Symmetric
from .codebook import NF4_LEVELS, MaxScaled, NormScaled, SinkChannelFourLevel
from .floats import FP8, MXFP4, NVFP4
from .rotations import Rotated, planar_blocks, quaternion_blocks, random_rotation, rotor_blocks, signed_hadamard
from .side import Side, SidesCodec, Transposed


def _turbo(bits: int, *, qjl: bool = False) -> Side:
    return Rotated(NormScaled(bits, qjl=qjl), random_rotation)


_SAME_FOR_K_AND_V: dict[str, Side] = {
    "int4_sym_g32": Symmetric(4, 32),
    "int4_affine_g32": Affine(4, 32),
    "affine_seven_level_3bit_g64_meta4": Affine(3, 64, meta_bits=4),
    "affine_seven_level_3bit_g32": Affine(3, 32),
    "hadamard_affine_four_level_2bit_g64_meta8": Rotated(Affine(2, 64, meta_bits=8), signed_hadamard),
    "hadamard_affine_four_level_2bit_g32": Rotated(Affine(2, 32), signed_hadamard),
    "sink1_channelwise_four_level_2bit": SinkChannelFourLevel(),
    "turbo2": _turbo(2),
    "turbo3": _turbo(3),
    "turbo4": _turbo(4),
    "rotor3": Rotated(NormScaled(3), rotor_blocks),
    "iso2": Rotated(NormScaled(2), quaternion_blocks),
    "planar3": Rotated(NormScaled(3), planar_blocks),
    "nf4": MaxScaled(NF4_LEVELS, 64),
    "mxfp4": MXFP4(),
    "nvfp4": NVFP4(),
    "fp8_e4m3": FP8(),
    "fp8_e4m3_amax": FP8(amax=True),
}
_K_THEN_V: dict[str, tuple[Side, Side]] = {
    # KIVI (arXiv 2402.02750): K per channel over the tokens of a page, V per token over its channels. The paper's
    # window of recent tokens in full precision is the suffix here, so the prefix has none.
    **{f"kivi{bits}": (Transposed(Affine(bits, PAGE_TOKENS)), Affine(bits)) for bits in (2, 3, 4)},
    # V is summed, not multiplied with a query: it keeps the mean-squared-error codec.
    **{f"turbo{bits}_qjl": (_turbo(bits, qjl=True), _turbo(bits)) for bits in (2, 3, 4)},
}
BASELINES: dict[str, Callable[[], PrefixCodec]] = {
    name: partial(SidesCodec, name, k, v)
    for name, (k, v) in (*((name, (side, side)) for name, side in _SAME_FOR_K_AND_V.items()), *_K_THEN_V.items())
}
