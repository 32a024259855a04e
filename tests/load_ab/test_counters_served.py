"""Probe, sampler and counters on a real server: what they show follows requests of known length."""

from __future__ import annotations

import httpx
import pytest
from transformers import AutoConfig

from sgl_hq.launch.demo_model import ensure_demo_model
from sgl_hq.launch.kv_accounts import bytes_per_token, read_peak
from sgl_hq.launch.load_ab.counter_probe import PROBE_TOKENS, empty_cache, probe, probe_server, send_one
from sgl_hq.launch.load_ab.counters import EVICTED, WITNESSES, Counters, read_counters
from sgl_hq.launch.load_ab.refusals import Incomparable
from sgl_hq.launch.load_ab.sampler import Sampler
from sgl_hq.launch.server_process import ServerProcess

SLOTS, PAGE = 2048, 64
ARGS = [
    "--page-size", str(PAGE), "--max-total-tokens", str(SLOTS), "--grammar-backend", "none", "--enable-metrics",
    "--enable-cache-report", "--decode-log-interval", "1", "--skip-server-warmup",
]  # fmt: skip


def generate(server: ServerProcess, first_id: int, prompt: int, output: int) -> dict:
    """One request; its prompt shares nothing with one of another `first_id`."""
    body = {
        "input_ids": list(range(first_id, first_id + prompt)),
        "sampling_params": {"max_new_tokens": output, "ignore_eos": True, "temperature": 0},
    }
    return httpx.post(f"{server.url}/generate", json=body, timeout=120.0).raise_for_status().json()["meta_info"]


@pytest.fixture(scope="module")
def token_bytes() -> int:
    return bytes_per_token(AutoConfig.from_pretrained(ensure_demo_model()))


@pytest.fixture(scope="module")
def server():
    with ServerProcess(str(ensure_demo_model()), ARGS, stop_grace_s=0) as running:
        yield running


def test_witnesses_are_there_from_the_start(server):
    """First test of the module: nothing has been answered yet, so counters are absent and their zeros rest on the witnesses."""
    names = {sample.name for sample in server.metrics()}
    absent = set(WITNESSES) - names
    assert {"sglang:prompt_tokens_total", EVICTED} <= absent
    assert {WITNESSES[counter] for counter in absent} <= names
    assert read_counters(server.metrics(), None) == Counters(0, 0, 0, 0, 0)


def test_the_counter_of_used_bytes_is_one(server, token_bytes):
    """And the allocated bytes of the same server, read in its place, are not."""
    probe_server(server, token_bytes, None)
    for lie in (
        lambda: SLOTS * token_bytes,
        lambda: read_peak(server.metrics(), token_bytes).bytes_used * 2,
        lambda: SLOTS * token_bytes - read_peak(server.metrics(), token_bytes).bytes_used,
    ):
        with pytest.raises(Incomparable):
            probe(lie, lambda tokens: send_one(server, tokens), server.flush_cache, token_bytes, PAGE, settle_s=1.0)


def test_samples_and_counters_follow_a_known_request(server, token_bytes):
    empty_cache(server.flush_cache, lambda tokens: send_one(server, tokens))
    before = read_counters(server.metrics(), None)
    with Sampler(server, token_bytes) as sampler:
        answer = generate(server, 2000, prompt=640, output=60)
    passed = read_counters(server.metrics(), None).since(before)

    series = sampler.series
    assert series.moments[0].bytes_used == 0, "the gauges show the flush"
    # 640 + 60 tokens, of which the last one's KV is never computed: 11 pages.
    assert series.resident_peak().value == 11 * PAGE and series.used_peak().value == 11 * PAGE * token_bytes
    assert series.running_peak().value == 1 and len(series.moments) >= 4
    assert 0 < series.used_mean().value < series.used_peak().value
    assert (answer["prompt_tokens"], answer["completion_tokens"], answer["cached_tokens"]) == (640, 60, 0)
    assert passed == Counters(evicted_tokens=0, retractions=0, requests=1, prompt_tokens=640, output_tokens=60)


def test_evictions_appear_with_the_first_one(server, token_bytes):
    """Four requests of ten pages into 32 pages: at least eight pages of the first ones must go."""
    empty_cache(server.flush_cache, lambda tokens: send_one(server, tokens))
    samples = server.metrics()
    assert EVICTED not in {s.name for s in samples}, "absent until something is evicted"
    before = read_counters(samples, None)
    for first_id in range(3000, 7000, 1000):
        generate(server, first_id, PROBE_TOKENS, 1)
    after = server.metrics()
    passed, resident = read_counters(after, None).since(before), read_peak(after, token_bytes).dense_tokens
    assert EVICTED in {s.name for s in after}
    # A token computed is either still resident or evicted; the last request may not have left its pages yet.
    assert passed.evicted_tokens == pytest.approx(4 * PROBE_TOKENS - resident, abs=PAGE) and passed.evicted_tokens >= 8 * PAGE
    assert generate(server, 6000, PROBE_TOKENS, 1)["cached_tokens"] == PROBE_TOKENS - PAGE
    assert generate(server, 3000, PROBE_TOKENS, 1)["cached_tokens"] < PROBE_TOKENS - PAGE, "it was the oldest"
