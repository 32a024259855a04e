"""What the server is told about a format on a model: served, or refused with the bound or the command to run."""

from __future__ import annotations

import json

import pytest

from sgl_hq.config import HQConfig, HQConfigError
from sgl_hq.gate import admission
from sgl_hq.gate.model_digest import model_digest
from sgl_hq.gate.record import own_records, record_path, write_record

from .conftest import full_record, full_trials


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SGLANG_HQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(admission, "SHIPPED", tmp_path / "shipped")
    return tmp_path


@pytest.fixture
def model(tiny_model):
    return str(tiny_model)


@pytest.fixture
def digest(model):
    return model_digest(model)


def state(model, fmt="hq6", **changed):
    return admission.gate_state(HQConfig(fmt), model, **changed)


@pytest.mark.parametrize("fmt", ["exact", "bf16", "lossless"])
def test_formats_that_lose_no_bit_need_no_gate_and_no_model(fmt):
    assert state("/nowhere", fmt).verdict == "not needed"


def test_without_a_record_the_command_is_named(model):
    found = state(model)
    assert found.verdict == "ungated" and not found.admits
    with pytest.raises(HQConfigError) as refused:
        admission.require(HQConfig("hq6"), found)
    assert f"`sgl-hq gate --model {model} --format hq6`" in str(refused.value) and "--hq-allow-ungated" in str(refused.value)
    admission.require(HQConfig("hq6", allow_ungated=True), found)


def test_a_passing_record_admits_its_own_format_only(model, digest):
    write_record(full_record(digest), own_records())
    assert state(model) == admission.GateState("passed", date="2026-01-02T03:04:05+00:00")
    admission.require(HQConfig("hq6"), state(model))
    assert state(model, "hq5").verdict == "ungated"


def test_a_failing_record_names_the_bound(model, digest):
    write_record(full_record(digest, trials=full_trials(mse_max=2.5, topk_min=0.6)), own_records())
    found = state(model)
    assert found.verdict == "failed"
    with pytest.raises(HQConfigError) as refused:
        admission.require(HQConfig("hq6"), found)
    for part in ("logit MSE 2.5, at most 0.25", "top-10 overlap 0.6, at least 0.8", "38 of 39 trials", "sgl-hq gate --all"):
        assert part in str(refused.value)
    admission.require(HQConfig("hq6", allow_ungated=True), found)


def test_shipped_records_come_second(model, digest):
    write_record(full_record(digest), admission.SHIPPED)
    assert state(model).verdict == "passed"
    write_record(full_record(digest, trials=full_trials(mse_max=2.5)), own_records())
    assert state(model).verdict == "failed"


def test_an_outdated_own_record_is_named_unless_a_shipped_one_counts(model, digest):
    path = write_record(full_record(digest, gate_version=0), own_records())
    assert state(model).verdict == "ungated" and f"{path} is of gate version 0" in state(model).reason
    write_record(full_record(digest), admission.SHIPPED)
    assert state(model).verdict == "passed"


def test_a_record_of_another_model_in_the_wrong_place_does_not_admit(model, digest):
    path = record_path(own_records(), digest, "hq6")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(full_record("f" * 16).to_json()))
    assert state(model).verdict == "ungated"


@pytest.mark.parametrize(
    "changed, said",
    [({"load_format": "dummy"}, "random weights"), ({"overrides": '{"rope_theta": 1}'}, "--json-model-override-args")],
)
def test_a_model_that_is_not_the_stored_one_is_ungated(model, digest, changed, said):
    write_record(full_record(digest), own_records())
    found = state(model, **changed)
    assert found.verdict == "ungated" and said in found.reason and "--hq-allow-ungated" in found.reason


def test_a_model_that_cannot_be_identified_is_ungated():
    found = state("nobody/nothing")
    assert found.verdict == "ungated" and "download it first" in found.reason and "--hq-allow-ungated" in found.reason


def test_plain_values_for_server_info(model):
    assert set(state(model).describe()) == {"verdict", "reason", "date"}
    assert all(isinstance(value, str) for value in state(model).describe().values())
