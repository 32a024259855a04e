"""A calibration is one file per checkpoint, and gives every layer a format of at most the bits asked for."""

from __future__ import annotations

import pytest
import torch

from sgl_hq.calibration.layer_formats import calibrated_codecs
from sgl_hq.calibration.store import CalibrationError, read_calibration
from sgl_hq.layer_codecs import layer_codecs
from sgl_hq.page_format import mean_stored_bits

from .samples import random_calibration


def test_what_is_saved_is_read(tmp_path):
    calibration, path = random_calibration(), tmp_path / "a" / "b.safetensors"
    calibration.save(path)
    found = read_calibration(path)
    assert found.digest == calibration.digest and found.model == calibration.model
    torch.testing.assert_close(found.k.forward, calibration.k.forward, rtol=0, atol=0)
    assert random_calibration(seed=1).digest != calibration.digest
    assert list(tmp_path.rglob("*.partial")) == []


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "none"])
def test_an_unusable_file_says_what_to_do(tmp_path, damage):
    path = tmp_path / "c.safetensors"
    random_calibration().save(path)
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CalibrationError, match="sgl-hq calibrate --model"):
        read_calibration(None if damage == "none" else path)


@pytest.mark.parametrize("bits", [3, 3.5, 4.25, 5, 7.75])
@pytest.mark.parametrize("dim", [64, 128])
def test_stored_bits_stay_below_the_name_and_near_it(bits, dim):
    codecs = calibrated_codecs(f"calib{bits}", bits, random_calibration(dim=dim))
    stored = mean_stored_bits([codec.layout for codec in codecs])
    assert bits - 0.1 < stored <= bits


def test_too_few_bits_are_refused():
    with pytest.raises(CalibrationError, match="ask for more bits"):
        calibrated_codecs("calib2", 2.0, random_calibration())


def test_a_calibration_of_another_model_is_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    random_calibration(layers=3, dim=64).save(path)
    assert len(layer_codecs("calib4.5", 3, 64, 64, path)) == 3
    for shape in ((4, 64, 64), (3, 128, 128), (3, 64, 128)):
        with pytest.raises(CalibrationError, match="run `sgl-hq calibrate`"):
            layer_codecs("calib4.5", *shape, path)


def test_uniform_formats_need_none():
    codecs = layer_codecs("hq4", 5, 64, 64)
    assert len(codecs) == 5 and {codec.fmt.name for codec in codecs} == {"hq4"}
