"""From a calibration and a number of bits to the page format of every layer."""

from __future__ import annotations

import torch

from sgl_hq.calibration.sensitivity import SINK_TOKENS
from sgl_hq.calibration.store import Calibration, CalibrationError, SideCalibration
from sgl_hq.calibration.widths import GROUP, allocate_widths
from sgl_hq.kernels.page_codec import PageCodec
from sgl_hq.kernels.page_codec.transform import Basis, Transform
from sgl_hq.page_format import STATED_PREFIX_TOKENS, PageFormat, mean_stored_bits


def calibrated_codecs(name: str, bits: float, calibration: Calibration, device: str | torch.device = "cpu") -> list[PageCodec]:
    """One codec per layer, together at most `bits` stored bits per value at a prefix of 1,024 tokens.

    Raises CalibrationError if so few bits cannot be reached.
    """
    sides = (calibration.k, calibration.v)
    importance = torch.stack([_by_group(side) for side in sides])  # [2, layers, D / 8]
    dims = [side.forward.shape[-1] for side in sides]
    mean_bits = bits
    while True:  # metadata and alignment come on top of the codes: lower the codes until the whole fits
        try:
            widths = allocate_widths(importance, mean_bits)
        except ValueError as error:
            raise CalibrationError(f"format {name} cannot be made: {error}, and metadata and sinks come on top; ask for more bits") from None
        formats = [_format(f"{name}-layer{layer}", k, v) for layer, (k, v) in enumerate(zip(*widths.tolist(), strict=True))]
        stored = mean_stored_bits([fmt.layout(*dims) for fmt in formats], STATED_PREFIX_TOKENS)
        if stored <= bits:
            break
        mean_bits -= max(stored - bits, 0.5 / importance.numel())
    transforms = [
        Transform(*(Basis(side.forward[layer].to(device), side.inverse[layer].to(device)) for side in sides))
        for layer in range(len(formats))
    ]
    return [PageCodec(fmt, *dims, transform) for fmt, transform in zip(formats, transforms, strict=True)]


def _by_group(side: SideCalibration) -> torch.Tensor:
    """[layers, D / 8]: heads share widths, so their importances are averaged."""
    return side.importance.mean(1).unflatten(-1, (-1, GROUP)).mean(-1)


def _format(name: str, k_widths: list[int], v_widths: list[int]) -> PageFormat:
    return PageFormat(
        name, "transform", k_widths[0], v_widths[0], SINK_TOKENS, k_widths=tuple(k_widths), v_widths=tuple(v_widths)
    )
