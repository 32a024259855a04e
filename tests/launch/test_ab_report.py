"""Planted mistakes must be caught: wrong plugin state, one flipped bit, other requests, contradicting accounts."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from sgl_hq.config import HQConfigError
from sgl_hq.launch import ab
from sgl_hq.launch.ab import _verdict, run
from sgl_hq.launch.ab_compare import ABError, compare, plugin_block
from sgl_hq.launch.ab_report import Phase, paragraph, row, table, write_json
from sgl_hq.launch.kv_accounts import AccountsError, KvAccounts, Peak, read_accounts, read_peak
from sgl_hq.launch.prometheus_text import Sample
from sgl_hq.launch.server_log import logged_batches
from sgl_hq.launch.waves import Answer, Wave

TOKEN_BYTES = 23040  # SmolLM2-135M: 30 layers x 3 kv heads x 64 x (K and V) x 2 bytes
HQ = {
    "active": True,
    "gate": {"verdict": "ungated", "reason": "no record", "date": ""},
    "format": "hq6",
    "pack": "shared",
    "stored_bits_per_value": 5.8,
    "metadata_bytes": 1000,
    "dense": {"tokens_total": 640, "tokens_free": 512, "bytes_per_token": TOKEN_BYTES, "bytes_allocated": 704 * TOKEN_BYTES},
    "packed": {"pages_used": 6, "bytes_used": 3_200_000, "bytes_allocated": 10_000_000, "dense_pages_lent": 0},
}
REQUIRED = (
    "arm format phase concurrency requests prompt_tokens cached_tokens reuse_factor packed_fraction kv_bytes_used "
    "kv_bytes_allocated ttft_ms_p50 tpot_ms_p50 output_tokens_per_s differing_answers differing_logprobs plugin_active"
).split()


def info(hq=None):
    return {"internal_states": [{} if hq is None else {"hq": hq}]}


def answer(user, logprobs=(-0.5, -1.25, -2.0), tokens=("a", "b", "c"), cached_tokens=64):
    return Answer(
        prefix=0,
        user=user,
        text="".join(tokens),
        tokens=tuple(tokens),
        logprobs=tuple(logprobs),
        top_logprobs=tuple(((t, p), ("other", p - 1)) for t, p in zip(tokens, logprobs)),
        prompt_tokens=100,
        cached_tokens=cached_tokens,
        completion_tokens=len(tokens),
        first_token_s=0.2,
        last_token_s=0.4,
    )


def wave(*answers, batches=(("prefill", 2, 128, 64), ("decode", 2))):
    return Wave(answers=tuple(answers), duration_s=0.5, batches=batches)


def phase(arm="vanilla", hq=None, waves=None, packed_tokens=0):
    kv = KvAccounts(256 - packed_tokens, packed_tokens, 5_000_000, 9_000_000, 3_200_000 if packed_tokens else 0)
    return Phase(arm, "warm", tuple(waves or [wave(answer(0), answer(1))]), kv, Peak(0, 0, 0), hq)


def metrics(total=640, available=512, kv_bytes=704 * TOKEN_BYTES):
    gauges = {"max_total_num_tokens": total, "kv_available_tokens": available, "kv_cache_memory_usage_gb": kv_bytes / 2**30}
    return [Sample(f"sglang:{name}", {}, value) for name, value in gauges.items()]


def test_the_right_plugin_state_passes():
    assert plugin_block("vanilla", info(), "shared") is None
    assert plugin_block("hq6", info(HQ), "shared") is HQ


@pytest.mark.parametrize(
    "arm, hq, said",
    [
        ("vanilla", HQ, "plugin active"),
        ("exact", None, "without our plugin"),
        ("exact", HQ, "format='hq6'"),
        ("hq6", HQ | {"active": False}, "active=False"),
        ("hq6", HQ | {"pack": "insert"}, "pack='insert'"),
    ],
)
def test_a_server_that_is_not_what_the_arm_says_is_refused(arm, hq, said):
    with pytest.raises(ABError, match=said):
        plugin_block(arm, info(hq), "shared")


def test_an_arm_equals_itself():
    same = compare([wave(answer(0), answer(1))], [wave(answer(0), answer(1))])
    assert (same.differing_answers, same.differing_logprobs, same.max_logprob_diff, same.equal_answers) == (0, 0, 0.0, 1.0)
    assert (same.unequal_waves, same.unequal_cached) == (0, 0)


def test_one_logprob_off_by_one_ulp_is_counted():
    off = float(np.nextafter(np.float32(-1.25), np.float32(0)))
    found = compare([wave(answer(0), answer(1))], [wave(answer(0), answer(1, logprobs=(-0.5, off, -2.0)))])
    assert (found.differing_answers, found.differing_logprobs) == (0, 1)
    assert found.max_logprob_diff == off + 1.25


def test_a_runner_up_off_by_one_ulp_is_counted():
    right = answer(0)
    top = ((("a", -0.5), ("other", math.nextafter(-1.5, 0))), *right.top_logprobs[1:])
    assert compare([wave(right)], [wave(replace(right, top_logprobs=top))]).differing_logprobs == 1


def test_nan_never_equals_nan():
    nan = answer(0, logprobs=(-0.5, math.nan, -2.0))
    assert compare([wave(nan)], [wave(nan)]).differing_logprobs == 1


def test_another_token_and_a_missing_token_are_differences():
    other = answer(0, tokens=("a", "x", "c"))
    shorter = answer(0, tokens=("a", "b"), logprobs=(-0.5, -1.25))
    found = compare([wave(answer(0))], [wave(other)])
    assert (found.differing_answers, found.differing_logprobs, found.equal_answers) == (1, 1, 0.0)
    assert compare([wave(answer(0))], [wave(shorter)]).differing_logprobs == 1


@pytest.mark.parametrize("other", [[wave(answer(1), answer(0))], [wave(answer(0))], [wave(answer(0)), wave(answer(1))], []])
def test_arms_with_different_requests_are_refused(other):
    with pytest.raises(ABError, match="same requests"):
        compare([wave(answer(0), answer(1))], other)


def test_other_batches_and_other_cached_tokens_are_counted():
    batches = (("prefill", 1, 64, 0), ("prefill", 1, 64, 64), ("decode", 2))
    split = wave(answer(0), answer(1, cached_tokens=0), batches=batches)
    found = compare([wave(answer(0), answer(1))], [split])
    assert (found.unequal_waves, found.unequal_cached) == (1, 1)


def test_batches_are_read_from_the_scheduler_log():
    log = (
        "[2026-01-01 00:00:00] Prefill batch, #new-seq: 3, #new-token: 2048, #cached-token: 64, token usage: 0.00\n"
        '[2026-01-01 00:00:01] INFO:     127.0.0.1:1 - "POST /v1/chat/completions HTTP/1.1" 200 OK\n'
        "[2026-01-01 00:00:01] Decode batch, #running-req: 3, #token: 64, token usage: 0.00\n"
    )
    assert logged_batches(log) == (("prefill", 3, 2048, 64), ("decode", 3))


def test_vanilla_accounts():
    kv = read_accounts(metrics(), None, TOKEN_BYTES)
    assert (kv.dense_tokens, kv.packed_tokens, kv.packed_fraction) == (128, 0, 0.0)
    assert (kv.bytes_used, kv.bytes_allocated) == (128 * TOKEN_BYTES, 704 * TOKEN_BYTES)


def test_hq_accounts_add_both_tiers():
    kv = read_accounts(metrics(), HQ, TOKEN_BYTES)
    assert (kv.dense_tokens, kv.packed_tokens, kv.packed_fraction) == (128, 384, 0.75)
    assert (kv.bytes_used, kv.bytes_allocated) == (128 * TOKEN_BYTES + 3_200_000, 704 * TOKEN_BYTES + 10_000_000)


@pytest.mark.parametrize(
    "samples, hq",
    [
        (metrics(kv_bytes=600 * TOKEN_BYTES), None),  # allocates less than its slots need
        (metrics(available=448), HQ),  # the two sources disagree about free slots
        (metrics(total=704, available=576), HQ),
        (metrics()[1:], None),  # a gauge is missing
        (metrics() + metrics(), None),  # two schedulers
    ],
)
def test_contradicting_accounts_are_refused(samples, hq):
    with pytest.raises(AccountsError):
        read_accounts(samples, hq, TOKEN_BYTES)


def test_rows_have_the_promised_keys_and_figures():
    base, mine = phase(), phase("hq6", HQ, packed_tokens=192)
    r = row(mine, compare(base.waves, mine.waves), 2, TOKEN_BYTES)
    assert set(REQUIRED) <= set(r)
    assert (r["requests"], r["prompt_tokens"], r["cached_tokens"], r["output_tokens"]) == (2, 200, 128, 6)
    assert r["reuse_factor"] == (200 + 6) / 256
    assert (r["packed_fraction"], r["plugin_active"], r["format"]) == (0.75, True, "hq6")
    assert (r["packed_fraction_at_peak"], r["kv_bytes_used_peak"]) == (0.75, r["kv_bytes_used"])
    busy = row(replace(mine, peak=Peak(6_000_000, 300, 100)), compare(base.waves, mine.waves), 2, TOKEN_BYTES)
    assert (busy["packed_fraction_at_peak"], busy["kv_bytes_used_peak"]) == (0.25, 6_000_000)
    assert (r["ttft_ms_p50"], r["tpot_ms_p50"]) == (pytest.approx(200), pytest.approx(100))
    assert r["output_tokens_per_s"] == pytest.approx(12)
    assert r["stored_bytes_per_shared_token"] == pytest.approx(3_200_000 / 192)
    assert r["stated_bytes_per_shared_token"] == pytest.approx(5.8 * TOKEN_BYTES / 16)


def test_the_peak_counts_both_tiers_of_one_answer():
    packed = [Sample("sglang:hq_packed_pages_used", {}, 3.0), Sample("sglang:hq_packed_bytes_used", {}, 5000.0)]
    assert read_peak(metrics(total=640, available=512), TOKEN_BYTES) == (128 * TOKEN_BYTES, 128, 0)
    assert read_peak(metrics(total=640, available=512) + packed, TOKEN_BYTES) == (128 * TOKEN_BYTES + 5000, 128, 192)


def test_vanilla_row():
    r = row(phase(), compare(phase().waves, phase().waves), 2, TOKEN_BYTES)
    assert (r["packed_fraction"], r["plugin_active"], r["format"], r["differing_logprobs"]) == (0, False, None, 0)
    assert r["stored_bytes_per_shared_token"] is None


def test_exact_that_differs_fails_and_a_lossy_arm_that_differs_does_not(capsys):
    off = [wave(answer(0), answer(1, logprobs=(-0.5, -1.2500001, -2.0)))]
    rows = [row(phase(arm, HQ, off), compare(phase().waves, off), 2, TOKEN_BYTES) for arm in ("exact", "hq6")]
    assert _verdict(rows) == 1
    assert "exact arm differs from vanilla in the warm phase: 0 answers, 1 log-prob" in capsys.readouterr().err
    assert _verdict(rows[1:]) == 0


def test_table_and_paragraph_name_every_arm():
    rows = [row(p, compare(phase().waves, p.waves), 2, TOKEN_BYTES) for p in (phase(), phase("hq6", HQ, packed_tokens=192))]
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    console.print(table(rows))
    shown = console.export_text()
    assert "vanilla" in shown and "hq6" in shown and "0.75" in shown
    assert [r["gate"] for r in rows] == [None, "ungated"]
    assert next(line.split()[-2:] for line in shown.splitlines() if "quality gate" in line) == ["-", "ungated"]
    assert "hq6 against vanilla, warm: KV bytes used 1.00x" in paragraph(rows)


def test_json_is_a_list_of_rows_with_facts_and_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "rows.json"
    r = row(phase(), compare(phase().waves, phase().waves), 2, TOKEN_BYTES)
    write_json([r], {"commit": None}, {"model": "m"}, path)
    assert json.loads(path.read_text()) == [r | {"commit": None, "configuration": {"model": "m"}}]
    with pytest.raises(ValueError):
        write_json([r | {"ttft_ms_p50": math.nan}], {}, {}, path)
    assert json.loads(path.read_text())[0]["arm"] == "vanilla"
    assert list(tmp_path.iterdir()) == [path]


def test_the_first_arm_must_be_vanilla():
    with pytest.raises(ABError, match="first arm"):
        run(arms=["exact", "hq6"])


@pytest.mark.parametrize(
    "options, said",
    [
        ({"arms": ["vanilla", "hq9"]}, "hq9"),
        ({"arms": ["vanilla", "hq6"], "packed_fraction": 1.5}, "1.5"),
        ({"arms": ["vanilla", "hq6"], "pack": "always"}, "always"),
    ],
)
def test_options_an_arm_cannot_have_are_refused_before_anything_starts(options, said):
    with pytest.raises(HQConfigError, match=said):
        run(model="/nonexistent", **options)


def test_an_arm_without_a_passed_gate_is_refused_before_vanilla_has_run(tmp_path, monkeypatch):
    monkeypatch.setattr(ab, "_prepare", lambda model, workload: ([], TOKEN_BYTES))
    monkeypatch.setattr(ab, "_measure", lambda setup, *_: pytest.fail(f"started {setup.arms}"))
    with pytest.raises(HQConfigError, match="quality gate.*--hq-allow-ungated"):
        run(model=str(tmp_path), arms=["vanilla", "hq6"])


def test_allowed_arms_get_the_flag_and_vanilla_does_not(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(ab, "_prepare", lambda model, workload: ([], TOKEN_BYTES))
    monkeypatch.setattr(ab, "_measure", lambda setup, *_: seen.append(setup))
    monkeypatch.setattr(ab, "_show", lambda rows: None)
    run(model=str(tmp_path), arms=["vanilla", "hq6"], allow_ungated=True)
    assert ["--hq-allow-ungated" in seen[0].server_args(arm) for arm in ("vanilla", "hq6")] == [False, True]


def test_a_missing_model_is_refused_in_one_sentence():
    with pytest.raises(ABError, match="No model at '/nonexistent/model'"):
        run(model="/nonexistent/model")


def test_a_json_path_that_cannot_be_written_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(ABError, match="no directory"):
        run(json_path=tmp_path / "missing" / "rows.json")


def test_rows_measured_before_an_arm_failed_are_written(tmp_path, monkeypatch):
    def fail_at_the_second_arm(setup, waves, logs, rows, progress):
        rows.append(row(phase(), compare(phase().waves, phase().waves), 2, setup.token_bytes))
        raise ABError("the exact arm runs without our plugin")

    monkeypatch.setattr(ab, "_prepare", lambda model, workload: ([], TOKEN_BYTES))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(ab, "_measure", fail_at_the_second_arm)
    with pytest.raises(ABError, match="without our plugin"):
        ab.run(model="m", json_path=tmp_path / "rows.json", allow_ungated=True)
    (written,) = json.loads((tmp_path / "rows.json").read_text())
    assert written["arm"] == "vanilla"
    assert written["configuration"]["arms"] == ["vanilla", "exact", "hq7"]
    assert set(written["versions"]) == {"sgl_hq", "sglang", "torch", "python"}
    assert written["machine"]["cores"] >= 1
