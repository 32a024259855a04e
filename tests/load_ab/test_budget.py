"""A started server is compared with its arm and the budget: type, pool, plugin, backend."""

from __future__ import annotations

import pytest
from row_samples import metrics_samples

from sgl_hq.launch.ab_compare import ABError
from sgl_hq.launch.bench_facts import BenchError
from sgl_hq.launch.bench_model import BenchModel
from sgl_hq.launch.load_ab.arms import make_arms
from sgl_hq.launch.load_ab.budget import Held, budget_bytes, budget_tokens, check_started, how_equal
from sgl_hq.launch.load_ab.plan import ArmSpec, parse_plan

TOKEN_BYTES, TOKENS = 1000, 6400
BUDGET = TOKENS * TOKEN_BYTES
MODEL = BenchModel("folder", "shape", "folder", TOKEN_BYTES, True)
VANILLA, FP8, HICACHE, HQ = make_arms(
    [ArmSpec(name="vanilla"), ArmSpec(name="fp8", kv_cache_dtype="fp8_e4m3"), ArmSpec(name="hicache", hicache_gib=1),
     ArmSpec(name="lossless", format="lossless")],
    BUDGET, MODEL, on_cpu=False,
)  # fmt: skip


class FakeServer:
    """As a server of `arm` would answer, with `changed` gauges and `hq` keys."""

    def __init__(self, arm, hq=None, backend="flashinfer", **changed):
        self._gauges = {
            "sglang:max_total_num_tokens": arm.slots,
            "sglang:kv_available_tokens": arm.slots,
            "sglang:kv_cache_memory_usage_gb": (arm.slots + 64) * arm.token_bytes / 2**30,
        } | changed
        state = {} if hq is None else {"hq": {"active": True, "format": "lossless", "pack": "shared", "workspace_bytes": 10_000} | hq}
        self._info = {"attention_backend": backend, "internal_states": [state]}

    def metrics(self):
        return metrics_samples(self._gauges)

    def server_info(self):
        return self._info


def tiers(dense=3_000_000, packed=3_000_000):
    return {"dense": {"bytes_allocated": dense}, "packed": {"bytes_allocated": packed}}


def test_what_a_server_states_is_taken_with_workspaces_and_host_memory_apart():
    held, hq = check_started(VANILLA, FakeServer(VANILLA))
    assert (held.allocated_bytes, held.host_bytes, hq) == (BUDGET, 0, None) and list(held.args) == VANILLA.server_args()
    assert check_started(FP8, FakeServer(FP8))[0].allocated_bytes == BUDGET
    host = {"sglang:hicache_host_total_tokens": 70_000}
    assert check_started(HICACHE, FakeServer(HICACHE, **host))[0].host_bytes == 70_000 * TOKEN_BYTES
    held, hq = check_started(HQ, FakeServer(HQ, tiers()))
    assert held.allocated_bytes == 6_010_000 and hq["format"] == "lossless"


@pytest.mark.parametrize(
    "arm, server, error, message",
    [
        (VANILLA, FakeServer(VANILLA, **{"sglang:max_total_num_tokens": 3000.0}), BenchError, "too little GPU memory"),
        (FP8, FakeServer(FP8, **{"sglang:kv_cache_memory_usage_gb": 2 * BUDGET / 2**30}), BenchError, "is fp8_e4m3 in force"),
        (VANILLA, FakeServer(VANILLA, backend="fa3"), BenchError, "attention backend fa3"),
        (HQ, FakeServer(HQ, tiers(packed=4_000_000)), BenchError, "the budget is 6,400,000"),
        (VANILLA, FakeServer(VANILLA, tiers()), ABError, "our plugin active"),
        (HQ, FakeServer(HQ), ABError, "without our plugin"),
        (HQ, FakeServer(HQ, tiers() | {"pack": "insert"}), ABError, "pack='insert'"),
    ],
)
def test_a_server_that_is_not_its_arm_is_refused(arm, server, error, message):
    with pytest.raises(error, match=message):
        check_started(arm, server)


def test_the_report_says_how_and_who_has_less_or_host_memory():
    held = {"vanilla": Held(BUDGET, 0, ()), "hicache": Held(BUDGET, 10**9, ()), "lossless": Held(BUDGET * 9 // 10, 0, ())}
    how = how_equal([VANILLA, HICACHE, HQ], held)
    assert "6,400,000 bytes" in how and "6,400 tokens in bfloat16" in how
    assert "hicache has 1,000,000,000 bytes of host memory besides" in how and "Arm lossless holds 5,760,000 bytes for KV, 10% less" in how


def test_the_budget_is_one_number_of_bytes():
    given = {"concurrency": 2, "arms": [{"name": "a"}], "workloads": [{"name": "w", "kind": "unshared", "context": 16, "requests": 2, "output": 1}]}
    assert budget_bytes(parse_plan(given | {"kv_tokens": 6400}), MODEL) == BUDGET
    gib = parse_plan(given | {"kv_gib": 0.5})
    assert budget_bytes(gib, MODEL) == 2**29 and budget_tokens(gib, MODEL) == 2**29 // TOKEN_BYTES
