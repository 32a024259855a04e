"""The codecs of this server process: the format it was asked for, and the calibration that start-up found."""

from __future__ import annotations

from pathlib import Path

from sglang.srt.runtime_context import get_server_args

from sgl_hq.config import HQConfig
from sgl_hq.kernels.page_codec import PageCodec
from sgl_hq.layer_codecs import layer_codecs
from sgl_hq.page_format import calibrated_bits
from sgl_hq.pool.sizing import KVShape


def codecs_of_server(config: HQConfig, shape: KVShape, device: str) -> list[PageCodec]:
    """One per layer. `patches/server_args.py` puts the path of the calibration into the server's arguments."""
    calibration = None if calibrated_bits(config.format) is None else Path(get_server_args()._hq_calibration)
    return layer_codecs(config.format, shape.layers, shape.head_dim, shape.v_head_dim, calibration, device)
