"""Records: a round trip, and every way in which one does not count."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from sgl_hq.gate.record import RecordError, finite_or_null, is_full, read_record, record_path, write_record

from .conftest import TRIAL, full_record, full_trials

DIGEST = "0123456789abcdef"


@pytest.mark.parametrize("changed", [{}, {"mse_max": 3.0}, {"mse_max": math.inf, "kl_mean": math.inf, "nll_packed": math.inf}])
def test_round_trip(tmp_path, changed):
    record = full_record(DIGEST, trials=full_trials(**changed))
    path = write_record(record, tmp_path)
    assert path == record_path(tmp_path, DIGEST, "hq6") and [p.name for p in path.parent.iterdir()] == ["hq6.json"]
    assert read_record(path, DIGEST, "hq6") == record
    figures = json.loads(path.read_text())["figures"]
    assert figures["verdict"] == ("fail" if changed else "pass") and figures["trials"] == 39


def test_another_model_format_or_version(tmp_path):
    for changed, said in [
        ({"model_digest": "f" * 16}, f"is of model {'f' * 16}, not {DIGEST}"),
        ({"format": "hq5"}, "is of format hq5, not hq6"),
        ({"layout_version": 0}, "page layout version 0"),
        ({"gate_version": 99}, "gate version 99"),
        ({"windows_digest": "other"}, "set of windows other"),
    ]:
        path = record_path(tmp_path, DIGEST, "hq6")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(replace(full_record(DIGEST), **changed).to_json()))
        with pytest.raises(RecordError, match=said):
            read_record(path, DIGEST, "hq6")


INCOMPLETE = {
    "a quick run": full_trials()[:10],
    "a trial twice": (*full_trials()[:-1], full_trials()[0]),
    "fewer steps": full_trials(steps=16),
    "own texts": (replace(TRIAL, window="mine.txt"),),
}


@pytest.mark.parametrize("trials", INCOMPLETE.values(), ids=INCOMPLETE)
def test_anything_but_the_full_gate(tmp_path, trials):
    assert is_full(full_trials()) and not is_full(trials)
    path = write_record(full_record(DIGEST, trials=trials), tmp_path)
    with pytest.raises(RecordError, match="not all those of the full gate"):
        read_record(path, DIGEST, "hq6")


@pytest.mark.parametrize("figure, value", [("verdict", "pass"), ("strict_trials", 39), ("mse_max", 0.2)])
def test_figures_that_the_trials_do_not_give(tmp_path, figure, value):
    path = write_record(full_record(DIGEST, trials=full_trials(mse_max=3.0)), tmp_path)
    data = json.loads(path.read_text())
    assert data["figures"][figure] != value
    data["figures"][figure] = value
    path.write_text(json.dumps(data))
    with pytest.raises(RecordError, match="states figures that its own trials do not give"):
        read_record(path, DIGEST, "hq6")


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"figures": {}, "trials": [{"window": 1}]}', '{"figures": {}, "trials": []}'])
def test_a_damaged_file(tmp_path, text):
    path = tmp_path / "hq6.json"
    path.write_text(text)
    with pytest.raises(RecordError, match="cannot be read"):
        read_record(path, DIGEST, "hq6")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path / "hq6.json", DIGEST, "hq6")


def test_only_numbers_that_are_not_finite_become_null():
    assert finite_or_null({"a": math.inf, "b": math.nan, "c": 1.5, "d": "x", "e": 3}) == {"a": None, "b": None, "c": 1.5, "d": "x", "e": 3}
