"""Rows from known answers, samples and counters: every figure worked out by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from row_samples import arm_facts, counters, good_row, requests, results, series

from sgl_hq.launch.kv_accounts import AccountsError
from sgl_hq.launch.load_ab.counters import Counters
from sgl_hq.launch.load_ab.figures import DEFINITIONS
from sgl_hq.launch.load_ab.run_row import Drive, failed_row, request_facts, run_row

DRIVE = Drive(concurrency=4, rate=None, repeat=2)


def values(row) -> dict:
    return {name: figure["value"] for name, figure in row["figures"].items()}


def test_every_figure_of_a_row():
    """Four requests of 512 + 9 tokens, 320 of each prompt cached; a second of 1,024 resident tokens, a second of 512."""
    row = run_row(arm_facts(max_context_tokens=4095), requests(), DRIVE, results(), series(), counters(), scores=[1, 0, 1, 1])
    expected = {
        "kv_bytes_allocated": 4_096_000, "kv_bytes_used_peak": 1_024_000, "kv_bytes_used_mean": 768_000,
        "resident_tokens_peak": 1024, "resident_tokens_mean": 768, "bytes_per_resident_token": 1000, "host_kv_bytes": 0,
        "packed_fraction": 0, "packed_fraction_peak": 0, "reuse_factor": 4 * 521 / 1024, "max_context_tokens": 4095, "max_running": 4,
        "modelled_gain": 1, "measured_gain": 1,
        "logical_tokens_attended": 4 * 521, "hit_rate": 320 / 512, "ideal_hit_rate": 1600 / 2048, "evicted_tokens": 64,
        "recomputed_tokens": 320, "retractions": 1,
        "ttft_ms_p50": 250, "ttft_ms_p90": 370, "ttft_ms_p99": 397, "tpot_ms_p50": 50, "tpot_ms_p90": 50, "tpot_ms_p99": 50,
        "e2e_ms_p50": 650, "e2e_ms_p90": 770, "e2e_ms_p99": 797,
        "output_tok_s": 36 / 1.1, "requests_s": 4 / 1.1, "task_score": 0.75, "requests_failed": 0,
    }  # fmt: skip
    assert set(expected) == set(DEFINITIONS)
    assert values(row) == pytest.approx(expected)
    assert row["load"] == {
        "requests": 4, "concurrency": 4, "rate": None, "context": 512, "prompt_tokens": 2048, "output_tokens": 36,
        "ideal_cached_tokens": 1600, "stops": False, "duration_s": pytest.approx(1.1),
    }  # fmt: skip
    assert row["per_request"]["ttft_ms"] == [100, 200, 300, 400] and row["per_request"]["cached_tokens"] == [320] * 4
    assert row["per_request"]["right"] == [1, 0, 1, 1]
    assert {key: row[key] for key in ("arm", "workload", "kind", "phase", "repeat", "seed", "requests_sha256", "failure")} == {
        "arm": "vanilla", "workload": "shared-2.6", "kind": "shared", "phase": "warm", "repeat": 2, "seed": 7,
        "requests_sha256": "ab12", "failure": None,
    }  # fmt: skip
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_gains_of_a_packed_arm_agree_where_the_format_keeps_its_word():
    """p over time: 768 packed token-seconds of 1,536; 4-bit records in a quarter of the bytes."""
    facts, packed = arm_facts("hq4", stored_bits=4.0), series(packed=768, packed_token_bytes=250)
    figures = values(run_row(facts, requests(), DRIVE, results(), packed, counters()))
    assert figures["packed_fraction"] == pytest.approx(0.5)
    assert figures["packed_fraction_peak"] == 0, "512 dense tokens are more bytes than 256 and 768 packed"
    assert figures["modelled_gain"] == pytest.approx(1 / (0.5 * 4 / 16 + 0.5))
    assert figures["measured_gain"] == pytest.approx(figures["modelled_gain"])
    assert figures["task_score"] is None and figures["max_context_tokens"] is None


def test_gains_of_an_fp8_arm():
    facts = arm_facts("fp8", token_bytes=500.0)
    figures = values(run_row(facts, requests(), DRIVE, results(), series(token_bytes=500.0), counters()))
    assert (figures["modelled_gain"], figures["measured_gain"], figures["bytes_per_resident_token"]) == (2, 2, 500)


def test_one_token_answers_have_no_time_between_tokens():
    short = Counters(0, 0, 4, 2048, 4)
    row = run_row(arm_facts(), requests(), DRIVE, results(output_tokens=1), series(), short)
    assert row["per_request"]["tpot_ms"] == [] and values(row)["tpot_ms_p50"] is None and values(row)["ttft_ms_p50"] == 250


def test_more_cached_than_ideal_is_no_negative_recomputation():
    """Pages of one token find more than the ideal cache of 64-token pages."""
    row = run_row(arm_facts(), requests(ideal_cached_tokens=1000), DRIVE, results(), series(), counters())
    assert values(row)["recomputed_tokens"] == 0


def test_failed_requests_make_a_failed_row():
    answers = results()
    answers[2] |= {"error": "connection reset", "output_tokens": 0}
    row = run_row(arm_facts(), requests(), DRIVE, answers, series(), counters())
    assert row["failure"] == "1 of 4 requests were not answered, the first one: connection reset"
    assert values(row)["requests_failed"] == 1 and len(row["per_request"]["ttft_ms"]) == 3
    lost = run_row(arm_facts(), requests(), DRIVE, results()[:3], series(), counters())
    assert lost["failure"] == "1 of 4 requests were not answered, the load client gave no result for them"
    none = run_row(arm_facts(), requests(), DRIVE, results(error="refused"), series(), counters())
    assert none["failure"].startswith("4 of 4") and none["figures"] == {}


def test_failed_rows_have_the_shape_of_rows():
    failed, good = failed_row("hq4", requests(), DRIVE, "The server ended."), good_row()
    assert set(failed) == set(good)
    for part in ("load", "per_request", "series"):
        assert set(failed[part]) == set(good[part])


@pytest.mark.parametrize("counted", [Counters(64, 1, 5, 2048, 36), Counters(64, 1, 4, 2049, 36), Counters(64, 1, 4, 2048, 35)])
def test_a_server_that_answered_something_else_is_refused(counted):
    with pytest.raises(AccountsError, match="send nothing else to this server"):
        run_row(arm_facts(), requests(), DRIVE, results(), series(), counted)


def test_facts_of_a_request_file():
    sent = [SimpleNamespace(stop=()), SimpleNamespace(stop=("\n",))]
    assert request_facts(SimpleNamespace(header=lambda: {"seed": 7}, requests=sent), "ab") == {
        "seed": 7, "requests_sha256": "ab", "stops": True,
    }  # fmt: skip
    assert request_facts(SimpleNamespace(header=dict, requests=sent[:1]), "ab")["stops"] is False
