"""Names that the gate accepts: page formats that are served, and reference formats that are only measured."""

from __future__ import annotations

from pathlib import Path

from sgl_hq.gate.errors import GateError
from sgl_hq.page_format import FORMATS, calibrated_bits, get_format
from sgl_hq.prefix_codec import CalibratedCodec, PrefixCodec, ServedCodec


def codec_of(name: str, calibration: Path | None = None, device: str = "cpu") -> PrefixCodec:
    """The codec of a page format, or of `sgl_hq.baselines`. calibration: the model's, for calibrated formats.

    Raises GateError for an unknown name, CalibrationError for a calibrated format without a usable calibration.
    """
    from sgl_hq.baselines import BASELINES

    if calibrated_bits(name) is not None:
        return CalibratedCodec(name, calibration, device)

    if name in BASELINES:
        return BASELINES[name]()
    try:
        return ServedCodec(get_format(name))
    except ValueError as error:
        raise GateError(f"{error} Reference formats: {', '.join(BASELINES)}.") from None


def lossy_presets() -> list[str]:
    """The presets that need a gate, as `--all` measures them."""
    return [name for name, fmt in FORMATS.items() if fmt.lossy]
