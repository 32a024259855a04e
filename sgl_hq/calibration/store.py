"""The calibration of one model: a basis for every layer and kv head, kept as one file per checkpoint.

Widths are not stored: they follow from the importances and the bits that a format name asks for.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sgl_hq.config import cache_folder

_TENSORS = ("forward", "inverse", "importance")
CALIBRATION_VERSION = 1  # raise it when the same texts give another basis


class CalibrationError(RuntimeError):
    """There is no usable calibration. One sentence with the remedy."""


@dataclass(frozen=True)
class SideCalibration:
    """Of K or of V. forward, inverse `[layers, H, D, D] float32`; importance `[layers, H, D] float64`, descending
    (transform.py)."""

    forward: torch.Tensor
    inverse: torch.Tensor
    importance: torch.Tensor


@dataclass(frozen=True)
class Calibration:
    """model: digest of the checkpoint; how: texts and sizes, for people; digest: 16 hexadecimal digits over all of it."""

    model: str
    k: SideCalibration
    v: SideCalibration
    how: dict[str, str]

    @property
    def digest(self) -> str:
        found = hashlib.sha256(json.dumps(self.how, sort_keys=True).encode())
        for name, tensor in sorted(self._tensors().items()):
            found.update(name.encode() + tensor.numpy().tobytes())
        return found.hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Whole or not at all: written beside, then renamed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        save_file(self._tensors(), partial, metadata={**self.how, "version": str(CALIBRATION_VERSION), "model": self.model})
        partial.replace(path)

    def check_shape(self, layers: int, head_dim: int, v_head_dim: int) -> None:
        """Raises CalibrationError unless it is of a model with these dimensions."""
        for side, dim in ((self.k, head_dim), (self.v, v_head_dim)):
            if len(side.forward) != layers or side.forward.shape[-1] != dim:
                raise CalibrationError(
                    f"the calibration is of {len(side.forward)} layers and head_dim {side.forward.shape[-1]}, the model has "
                    f"{layers} and {dim}: run `sgl-hq calibrate` on this model"
                )

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{side}.{name}": getattr(part, name).contiguous()
            for side, part in (("k", self.k), ("v", self.v))
            for name in _TENSORS
        }


def calibration_path(model_digest: str) -> Path:
    return cache_folder() / "calibrations" / f"{model_digest}.safetensors"


def read_calibration(path: Path | None, model: str = "MODEL") -> Calibration:
    """model: what the user calls it, for the remedy. Raises CalibrationError if there is none or it cannot be read."""
    remedy = f"run `sgl-hq calibrate --model {model}`"
    if path is None or not path.exists():
        raise CalibrationError(f"this model has no calibration, which formats calib* need: {remedy}")
    try:
        with safe_open(path, "pt") as file:
            how = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        version, model = how.pop("version"), how.pop("model")
        sides = [SideCalibration(*(tensors[f"{side}.{name}"] for name in _TENSORS)) for side in "kv"]
    except (OSError, SafetensorError, KeyError) as error:
        raise CalibrationError(f"cannot read the calibration {path} ({error}): {remedy} again") from error
    if version != str(CALIBRATION_VERSION):
        raise CalibrationError(f"the calibration {path} was made by another version: {remedy} again")
    return Calibration(model, *sides, how)
