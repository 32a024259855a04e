"""One calibration: model and texts to a saved basis."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers

from sgl_hq.calibration.sensitivity import measure_sensitivity
from sgl_hq.calibration.store import Calibration, SideCalibration
from sgl_hq.calibration.transform import fit_transform
from sgl_hq.calibration.windows import calibration_windows
from sgl_hq.gate.run import GateModel

PREFIX_TOKENS, STEPS = 1024, 64
PROBES = 4  # random directions a window; more cost a backward pass each and lower the noise of the metric


def calibrate(loaded: GateModel, model_digest: str, advance: Callable[[], None]) -> Calibration:
    """Needs about two forward passes of 1,024 tokens a window; `advance` is called after each of
    `len(calibration_windows())`. Raises GateError where a text is too short for the tokenizer."""
    windows = calibration_windows()
    ids = [window.token_ids(loaded.tokenizer, PREFIX_TOKENS + STEPS) for window in windows]
    found = measure_sensitivity(loaded.model, ids, PREFIX_TOKENS, STEPS, PROBES, advance)
    sides = [SideCalibration(*fit_transform(side)) for side in found]
    how = {
        "windows": ",".join(window.name for window in windows),
        "prefix_tokens": str(PREFIX_TOKENS), "steps": str(STEPS), "probes": str(PROBES),
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    return Calibration(model_digest, *sides, how)
