"""Every arm's server gets the same bytes, and what cannot run is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgl_hq.config import HQConfigError
from sgl_hq.launch.bench_model import BenchModel
from sgl_hq.launch.load_ab.arms import make_arms
from sgl_hq.launch.load_ab.plan import ArmSpec, PlanError

TOKEN_BYTES, TOKENS = 57_344, 200_000
BUDGET = TOKENS * TOKEN_BYTES
MODEL = BenchModel("folder", "shape", "words", TOKEN_BYTES, True)


def arm(on_cpu=False, budget=BUDGET, **spec):
    return make_arms([ArmSpec(name="it", **spec)], budget, MODEL, on_cpu)[0]


def option(args, name):
    return args[args.index(name) + 1]


@pytest.mark.parametrize(
    "spec, times",
    [({}, 1), ({"page_size": 1}, 1), ({"kv_cache_dtype": "fp8_e4m3"}, 2), ({"kv_cache_dtype": "fp4_mx_block16"}, 16 / 4.5),
     ({"hicache_gib": 32}, 1), ({"format": "lossless"}, 1)],
)  # fmt: skip
def test_slots_and_the_page_of_padding_fill_the_budget_and_no_more(spec, times):
    made = arm(**spec)
    slots, page = int(option(made.server_args(), "--max-total-tokens")), made.spec.page_size
    assert slots % page == 0 and int(option(made.server_args(), "--page-size")) == page
    allocated = (slots + page) * made.token_bytes
    assert made.token_bytes == TOKEN_BYTES / times and BUDGET - page * made.token_bytes < allocated <= BUDGET


def test_arms_say_what_they_are():
    assert option(arm().server_args(), "--attention-backend") == "flashinfer"
    assert option(arm(kv_cache_dtype="fp4_mx_block16").server_args(), "--attention-backend") == "triton"
    assert option(arm(radix_eviction_policy="lfu").server_args(), "--radix-eviction-policy") == "lfu"
    hicache = arm(hicache_gib=32).server_args()
    assert "--enable-hierarchical-cache" in hicache and option(hicache, "--hicache-size") == "34", "32 GiB in GB, rounded down"
    hq4 = arm(format="hq4", hq_pack="insert", hq_packed_fraction=0.75, allow_ungated=True).server_args()
    assert [option(hq4, f"--hq-{name}") for name in ("format", "pack", "packed-fraction")] == ["hq4", "insert", "0.75"]
    assert option(arm(format="hq4", hq_packed_fraction="auto", allow_ungated=True).server_args(), "--hq-packed-fraction") == "auto"
    assert "--hq-allow-ungated" in hq4 and "--hq-packed-fraction" not in arm(format="exact").server_args()
    assert arm(args=("--chunked-prefill-size", "4096")).server_args()[-2:] == ["--chunked-prefill-size", "4096"]
    assert not any("hq" in word for word in arm().server_args())


def test_servers_differ_in_their_arms_arguments_only(tmp_path):
    argv = [arm(on_cpu, **spec).server(MODEL, tmp_path / "log").argv for on_cpu in (True, False) for spec in ({}, {"format": "exact"})]
    for vanilla, exact in (argv[:2], argv[2:]):
        extra = ["--hq-format", "exact", "--hq-pack", "shared"]
        assert [word for word in exact if word not in extra and not word.isdigit()] == [word for word in vanilla if not word.isdigit()]
    assert option(argv[0], "--device") == "cpu" and "--attention-backend" not in argv[0] and "--mem-fraction-static" in argv[2]
    assert option(argv[0], "--tokenizer-path") == "words" and option(argv[0], "--load-format") == "dummy"


@pytest.mark.parametrize(
    "spec, what",
    [({"kv_cache_dtype": "fp8_e4m3"}, "kv_cache_dtype fp8_e4m3"), ({"kv_cache_dtype": "fp4_mx_block16"}, "fp4"),
     ({"hicache_gib": 2}, "HiCache"), ({"attention_backend": "fa3"}, "attention_backend fa3")],
)  # fmt: skip
def test_what_needs_a_gpu_is_refused_on_a_cpu(spec, what):
    assert arm(**spec).slots
    with pytest.raises(PlanError, match=f"Arm it: .*{what}.* needs a GPU: leave the arm out"):
        arm(on_cpu=True, **spec)


def test_a_budget_or_host_memory_that_is_too_small_is_refused():
    with pytest.raises(PlanError, match="not even two pages"):
        arm(budget=100 * TOKEN_BYTES)
    with pytest.raises(PlanError, match="hicache_gib at least 1"):
        arm(hicache_gib=0.5)


def test_a_format_that_may_not_be_served_is_refused_before_the_first_server():
    with pytest.raises(HQConfigError, match="quality gate"):
        arm(format="hq4")
    with pytest.raises(HQConfigError, match="unknown --hq-format"):
        arm(format="hq99")
    assert Path(arm(format="hq4", allow_ungated=True).server(MODEL, Path("log")).log_path).name == "log"
