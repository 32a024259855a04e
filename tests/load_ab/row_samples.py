"""Run rows made by the code that makes the real ones, from made-up answers, samples and counters."""

from __future__ import annotations

from typing import Any

from sgl_hq.launch.load_ab.counters import Counters
from sgl_hq.launch.load_ab.phase_amounts import ArmFacts
from sgl_hq.launch.load_ab.run_row import Drive, run_row
from sgl_hq.launch.load_ab.sampler import Moment, Series

TOKEN_BYTES = 1000
BUDGET_TOKENS = 4096
PROMPT, OUTPUT, REQUESTS = 512, 9, 4


def metrics_samples(values: dict[str, float]):
    """As ServerProcess.metrics gives them: what every scheduler has, and `values` over it."""
    from sgl_hq.launch.prometheus_text import Sample

    usual = {
        "sglang:max_total_num_tokens": BUDGET_TOKENS, "sglang:kv_available_tokens": BUDGET_TOKENS,
        "sglang:num_running_reqs": 0, "sglang:num_queue_reqs": 0, "sglang:num_retracted_reqs": 0, "sglang:startup_time_seconds": 9.0,
    }  # fmt: skip
    return [Sample(name, {}, float(value)) for name, value in (usual | values).items()]


def requests(kind: str = "shared", **changed: Any) -> dict[str, Any]:
    return {
        "workload": "shared-2.6", "kind": kind, "phase": "warm", "seed": 7, "context": PROMPT, "requests": REQUESTS,
        "prompt_tokens": REQUESTS * PROMPT, "output_tokens": REQUESTS * OUTPUT, "ideal_cached_tokens": 1600,
        "requests_sha256": "ab12", "stops": False, "about": "four requests",
    } | changed  # fmt: skip


def results(**changed: Any) -> list[dict[str, Any]]:
    """Request i starts at i tenths of a second; its first token takes 100 (i + 1) ms, each further one 50 ms."""
    return [
        {
            "ttft_s": 0.1 * (i + 1), "latency_s": 0.1 * (i + 1) + 0.05 * (OUTPUT - 1), "output_tokens": OUTPUT, "prompt_tokens": PROMPT,
            "cached_tokens": 320, "start_s": 0.1 * i, "text": "", "error": None,
        } | changed
        for i in range(REQUESTS)
    ]  # fmt: skip


def series(packed: int = 0, token_bytes: float = TOKEN_BYTES, packed_token_bytes: float = 0.0) -> Series:
    """1,024 resident tokens for the first half of the time, 512 dense ones for the second, `packed` of the first packed."""
    used = (1024 - packed) * token_bytes + packed * packed_token_bytes
    return Series(
        (
            Moment(0.0, used, 1024 - packed, packed, 4, 1, 0),
            Moment(1.0, used, 1024 - packed, packed, 2, 0, 0),
            Moment(1.0, 512 * token_bytes, 512, 0, 1, 0, 0),
            Moment(2.0, 512 * token_bytes, 512, 0, 0, 0, 0),
        ),
        token_bytes,
    )


def arm_facts(arm: str = "vanilla", **changed: Any) -> ArmFacts:
    facts = {"allocated_bytes": BUDGET_TOKENS * TOKEN_BYTES, "token_bytes": TOKEN_BYTES, "bf16_token_bytes": TOKEN_BYTES}
    return ArmFacts(arm, **facts | {"stored_bits": 16.0} | changed)


def counters() -> Counters:
    return Counters(evicted_tokens=64, retractions=1, requests=REQUESTS, prompt_tokens=REQUESTS * PROMPT, output_tokens=REQUESTS * OUTPUT)


def good_row(arm: str = "vanilla", repeat: int = 0, **changed: Any) -> dict[str, Any]:
    """changed: of `requests`, so that answers and counters still agree with it."""
    return run_row(arm_facts(arm), requests(**changed), Drive(4, None, repeat), results(), series(), counters())
