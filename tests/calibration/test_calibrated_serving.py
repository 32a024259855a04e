"""From `sgl-hq calibrate` to a server that may or may not hold pages in a calibrated format."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sgl_hq.calibration import run as calibration_run
from sgl_hq.calibration.store import CalibrationError, calibration_path, read_calibration
from sgl_hq.config import HQConfig, HQConfigError
from sgl_hq.gate import admission
from sgl_hq.gate.codecs import codec_of
from sgl_hq.gate.model_digest import model_digest
from sgl_hq.gate.record import GateRecord, own_records, write_record
from sgl_hq.gate.run import GateModel
from sgl_hq.gate.windows import shipped_digest
from sgl_hq.hq_cache import HQCache

LAYERS, HEADS, DIM = 2, 2, 16


class Words:
    """One id for each character: a tokenizer of its own would say nothing more here."""

    chat_template = None

    def __call__(self, text: str, **_) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 60 for c in text]}


@pytest.fixture
def model(tmp_path, monkeypatch) -> str:
    """A checkpoint, and an empty cache folder."""
    monkeypatch.setenv("SGLANG_HQ_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=HEADS, head_dim=DIM, initializer_range=0.2, max_position_embeddings=2048,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def calibrated(model, monkeypatch) -> str:
    """The same, calibrated quickly."""
    monkeypatch.setattr(calibration_run, "PREFIX_TOKENS", 128)
    monkeypatch.setattr(calibration_run, "STEPS", 4)
    monkeypatch.setattr(calibration_run, "PROBES", 1)
    network, advanced = LlamaForCausalLM.from_pretrained(model).eval(), []
    found = calibration_run.calibrate(GateModel(network, Words()), model_digest(model), lambda: advanced.append(1))
    found.save(calibration_path(model_digest(model)))
    assert len(advanced) == len(found.how["windows"].split(","))
    return model


def _state(model: str, fmt: str = "calib5", **changed) -> admission.GateState:
    return admission.gate_state(HQConfig(fmt, allow_ungated=True), model, **changed)


def test_without_a_calibration_nothing_is_served_even_ungated(model):
    with pytest.raises(HQConfigError, match=f"cannot be served.*sgl-hq calibrate --model {model}"):
        _state(model)
    with pytest.raises(HQConfigError, match="load-format dummy"):
        _state(model, load_format="dummy")
    with pytest.raises(CalibrationError, match="sgl-hq calibrate"):
        codec_of("calib5", calibration_path(model_digest(model)))


def test_a_record_holds_for_the_calibration_it_was_made_with(calibrated):
    digest = model_digest(calibrated)
    path = calibration_path(digest)
    found = _state(calibrated)
    assert (found.verdict, found.calibration) == ("ungated", str(path))
    record = _passing_record(digest, read_calibration(path).digest)
    write_record(record, own_records())
    assert _state(calibrated).verdict == "passed"
    assert _state(calibrated, "calib5.5").verdict == "ungated"
    again = read_calibration(path)
    replace(again, how=again.how | {"windows": "others"}).save(path)
    after = _state(calibrated)
    assert after.verdict == "ungated" and "of calibration" in after.reason


def _passing_record(digest: str, calibration: str) -> GateRecord:
    from sgl_hq.gate.bounds import PREFIX_TOKENS, STEPS
    from sgl_hq.gate.figures import Trial
    from sgl_hq.gate.windows import CORE, HOLD_OUT

    trials = tuple(
        Trial(w, n, STEPS, 0.1, 0.01, 0.1, 0.9, 30, 1.0, 1.0, 0.01, 0.01, 0.001, 2.0, 2.0, 5.0, 5.0)
        for w in (*CORE, *HOLD_OUT)
        for n in PREFIX_TOKENS
    )
    return GateRecord("m", digest, "calib5", trials, "2026-01-01T00:00:00+00:00", {}, windows_digest=shipped_digest(), calibration=calibration)


def test_hq_cache_packs_with_a_codec_of_every_layer(calibrated):
    codec = codec_of("calib5", calibration_path(model_digest(calibrated)))
    cache, generator = HQCache(codec), torch.Generator().manual_seed(0)
    dense = [torch.randn(1, HEADS, 200, DIM, generator=generator) for _ in range(2 * LAYERS)]
    for layer in range(LAYERS):
        cache.update(dense[2 * layer], dense[2 * layer + 1], layer)
    assert cache.pack() == 192
    for layer in range(LAYERS):
        k, _ = cache.update(dense[2 * layer][:, :, :1], dense[2 * layer + 1][:, :, :1], layer)
        error = (k[:, :, :200] - dense[2 * layer]).norm() / dense[2 * layer].norm()
        assert 0 < error < 0.5, "white noise in a basis made for text keeps most of itself at 5 bits"


def test_the_texts_are_none_of_the_gates():
    from sgl_hq.calibration.windows import calibration_windows
    from sgl_hq.gate.windows import shipped_windows

    mine, gates = calibration_windows(), "\n".join(window.text for window in shipped_windows())
    assert len(mine) == 23 and {window.kind for window in mine} == {"book", "chat", "code", "copy"}
    for window in mine:
        assert window.text[200:300] not in gates
