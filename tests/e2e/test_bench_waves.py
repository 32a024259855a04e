"""`sgl-hq bench serve` on the CPU: the real generator, real servers of both kinds, tiny waves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sgl_hq.launch import bench_serve
from sgl_hq.launch.bench_arms import parse_arms
from sgl_hq.launch.bench_client import LoadClient
from sgl_hq.launch.bench_model import real_model
from sgl_hq.launch.bench_serve import Setup, sessions
from sgl_hq.launch.bench_workloads import WORKLOADS, Wave
from sgl_hq.launch.server_process import ServerProcess

KV_TOKENS, USERS, OUTPUT = 16384, 3, 8
LOADS = (
    replace(WORKLOADS["4x16"], wave=Wave(2, USERS, 128, 32, OUTPUT)),
    replace(WORKLOADS["cold"], wave=Wave(4, 1, 128, 32, OUTPUT)),
    replace(WORKLOADS["own8192"], wave=Wave(4, 1, 128, 32, OUTPUT)).under("shared"),
)


class OnCPU(Setup):
    def server(self, session, log):
        args = session.arm.server_args(self.kv_tokens, session.pack, self.packed_fraction)
        backend = args.index("--attention-backend")
        args[backend : backend + 2] = []
        args += ["--grammar-backend", "none", "--enable-metrics", "--enable-cache-report", "--decode-log-interval", "1"]
        return ServerProcess(self.model.path, args, log_path=log, stop_grace_s=0)


@pytest.fixture(scope="module")
def rows(model, tmp_path_factory):
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_serve, "check_pool", lambda *_: None)  # it asks for a GPU's attention backend
        patch.setattr(bench_serve, "WARM_UP", (Wave(1, 2, 128, 16, 2, concurrency=1, seed=7),))
        todo = sessions(parse_arms("vanilla,hq7"), LOADS)
        bench_serve.measure(OnCPU(real_model(str(model), None), KV_TOKENS, 0.5), todo, 1, tmp_path_factory.mktemp("bench"), found)
    return found


def test_every_arm_decodes_the_whole_wave_at_once(rows):
    assert [(row["format"], row["workload"], row["failure"]) for row in rows] == [
        (fmt, load.name, None) for fmt in (None, "hq7") for load in LOADS
    ]
    for row, load in zip(rows, LOADS * 2, strict=True):
        requests = load.wave.requests
        assert row["running_mean"] == requests, "not all waited when the first one was prefilled"
        assert row["prompt_tokens"] == requests * (load.wave.prefix + load.wave.question), "ids are not tokenized again"
        assert 0 < row["ttft_ms"] < 1e3 * row["duration_s"]
        assert row["output_tok_s"] == pytest.approx(requests * load.wave.output / row["duration_s"])
        assert row["cached_tokens"] >= requests * load.wave.prefix if load.prime else row["cached_tokens"] == 0
        assert row["tpot_ms"] > 0 and row["step_ms_full"] > 0


def test_primed_prefixes_are_packed_and_nothing_else(rows):
    for row, load in zip(rows, LOADS * 2, strict=True):
        packed = row["format"] is not None and load.prime
        assert row["packed_tokens"] == (load.wave.groups * load.wave.prefix if packed else 0)
        assert bool(row["packed_tokens_read"]) == bool(packed)
