"""From the name of a format to the codec of every layer: the same one everywhere, or one per layer by calibration."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from sgl_hq.calibration.layer_formats import calibrated_codecs
from sgl_hq.calibration.store import read_calibration
from sgl_hq.kernels.page_codec import PageCodec
from sgl_hq.page_format import calibrated_bits, get_format


def layer_codecs(
    name: str,
    layers: int,
    head_dim: int,
    v_head_dim: int,
    calibration: Path | None = None,
    device: str | torch.device = "cpu",
) -> list[PageCodec]:
    """`layers` codecs. calibration: the model's file (calibration/store.py), needed by calibrated formats only.

    Raises ValueError for an unknown name, CalibrationError if the calibration is missing, unreadable or of another shape.
    """
    bits = calibrated_bits(name)
    if bits is None:
        return [_uniform(name, head_dim, v_head_dim)] * layers
    found = read_calibration(calibration)
    found.check_shape(layers, head_dim, v_head_dim)
    return calibrated_codecs(name, bits, found, device)


@cache
def _uniform(name: str, head_dim: int, v_head_dim: int) -> PageCodec:
    return PageCodec(get_format(name), head_dim, v_head_dim)
