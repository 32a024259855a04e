"""`sgl-hq bench serve` without a GPU: arms, sessions, waves, ratios and verdicts; servers and load generator are stand-ins."""

from __future__ import annotations

import json
import os
import signal
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sgl_hq.launch import bench_serve
from sgl_hq.launch.ab_compare import ABError
from sgl_hq.launch.bench_arms import DEFAULT_ARMS, Arm, parse_arms
from sgl_hq.launch.bench_client import LoadClient
from sgl_hq.launch.bench_facts import BenchError
from sgl_hq.launch.bench_generator import TokenIdPrompts
from sgl_hq.launch.bench_model import QWEN_7B, BenchModel, shape_with_dummy_weights
from sgl_hq.launch.bench_serve import Session, Setup, check_pool, measure, missing_backend, sessions
from sgl_hq.launch.bench_serve_report import judge, show, unequal_batches
from sgl_hq.launch.bench_workloads import WARM_UP, WORKLOADS, Wave, better, figures, parse_workloads
from sgl_hq.launch.prometheus_text import Sample
from sgl_hq.launch.server_log import full_batch_step_ms, mean_running
from sgl_hq.launch.server_process import ServerFailed
from sgl_hq.launch.signals import terminated_like_interrupted

TOKEN_BYTES = 28 * 4 * 128 * 2 * 2
MODEL = BenchModel("folder", "shape", "folder", TOKEN_BYTES, True)
FACTS = {"versions": {"sglang": "0.5.17"}, "machine": {"gpu": "H200"}, "commit": "abc", "model": "shape", "kv_tokens": 1000}


def result(tpot=8.0, ttft=100.0, out=7000.0, completed=64) -> dict:
    """A line of bench_serving's output file, as far as it is read."""
    values = {"tpot": tpot, "ttft": ttft, "itl": tpot}
    times = {f"{kind}_{metric}_ms": value for kind in ("median", "p99") for metric, value in values.items()}
    rates = {"output_throughput": out, "input_throughput": 1.0, "request_throughput": 2.0, "duration": 3.0, "total_output_tokens": 9}
    return times | rates | {"completed": completed, "cache_report": {"total_prompt_tokens": 10, "total_cached_tokens": 8}}


def test_arms_are_parsed():
    assert [arm.name for arm in parse_arms("vanilla, vanilla/fa3,vanilla/flashinfer/fp8_e4m3,exact,hq4/triton")] == [
        "vanilla/flashinfer", "vanilla/fa3", "vanilla/flashinfer/fp8_e4m3", "exact/flashinfer", "hq4/triton",
    ]  # fmt: skip
    assert len(parse_arms(DEFAULT_ARMS)) == 10
    assert [arm.packs for arm in parse_arms("vanilla,exact,bf16")] == [False, False, True]


@pytest.mark.parametrize("text", ["hq9", "vanilla/xformers", "hq4/fa3/fp8_e4m3", "vanilla/fa3/fp4", "vanilla/fa3/auto/x", "", "hq4,hq4"])
def test_what_is_no_arm_is_refused(text):
    with pytest.raises(BenchError, match="--arms"):
        parse_arms(text)


def test_arms_have_equal_bytes_and_say_what_they_are():
    arms = parse_arms("vanilla,vanilla/flashinfer/fp8_e4m3,exact,bf16,hq6")
    args = {arm.name: arm.server_args(1000, "insert", 0.25) for arm in arms}
    assert [a[a.index("--max-total-tokens") + 1] for a in args.values()] == ["1000", "2000", "1000", "1000", "1000"]
    assert not any("hq" in part or part == "--page-size" for name in args if "vanilla" in name for part in args[name])
    assert "--hq-packed-fraction" not in args["exact/flashinfer"] and "--hq-allow-ungated" not in args["bf16/flashinfer"]
    hq6 = args["hq6/flashinfer"]
    assert hq6[hq6.index("--hq-pack") + 1] == "insert" and hq6[hq6.index("--hq-packed-fraction") + 1] == "0.25"
    assert "--hq-allow-ungated" in hq6


def test_one_server_for_each_policy_that_packs():
    loads = parse_workloads("4x16,own8192,cold")
    made = sessions(parse_arms("vanilla,exact,hq4"), loads)
    assert [(s.arm.name.split("/")[0], s.pack, [load.name for load in s.workloads]) for s in made] == [
        ("vanilla", "shared", ["4x16", "own8192", "cold"]),
        ("exact", "shared", ["4x16", "own8192", "cold"]),
        ("hq4", "shared", ["4x16", "cold"]),
        ("hq4", "insert", ["own8192"]),
    ]


def test_the_workloads_are_those_of_the_issue():
    waves = {name: (load.wave.groups, load.wave.per_group, load.wave.prefix) for name, load in WORKLOADS.items()}
    assert waves["4x16"] == (4, 16, 8192) and waves["1x256"] == (1, 256, 8192)
    assert waves["own8192"] == (64, 1, 8192) and waves["own32000"] == (16, 1, 32000)
    for load in WORKLOADS.values():
        # A packing arm at the default fraction has half of the budget for dense pages.
        tokens = load.wave.groups * load.wave.prefix + load.wave.requests * (load.wave.question + load.wave.output)
        assert tokens < load.kv_tokens / (1 if load.prime else 2)
        assert load.wave.prefix + load.wave.question + load.wave.output < QWEN_7B["max_position_embeddings"]
    with pytest.raises(BenchError, match="choose from 4x16"):
        parse_workloads("4x17")


def test_priming_has_the_same_prefixes_and_other_questions():
    for name in ("4x16", "own8192"):
        load = WORKLOADS[name]
        assert load.priming.seed == load.wave.seed and load.priming.prefix == load.wave.prefix
        assert load.priming.groups == load.wave.groups and load.priming.question != load.wave.question
    assert WORKLOADS["4x16"].priming.concurrency == 1  # the second user must find the first one's pages
    assert WORKLOADS["cold"].priming is None and WORKLOADS["4x16"].wave.seed not in {wave.seed for wave in WARM_UP}


def test_one_policy_for_all_workloads_needs_one_server_and_primes_as_it_must():
    loads = [load.under("shared") for load in parse_workloads("4x16,cold,own8192")]
    assert len(sessions(parse_arms("hq4"), loads)) == 1
    assert [load.prime for load in loads] == [2, 0, 2] and loads[2].priming.concurrency == 1
    assert [load.under("insert").prime for load in loads] == [1, 0, 1]
    with pytest.raises(BenchError, match="choose from shared, insert"):
        bench_serve.run(pack="later")


def test_arms_of_other_concurrency_are_warned_about():
    same, slow, unknown = ({"arm": name, "running_mean": mean} for name, mean in (("a", 64.0), ("b", 60.0), ("c", None)))
    assert unequal_batches([same, slow, unknown]) is None and unequal_batches([unknown]) is None
    assert "a 64, d 50" in unequal_batches([same, {"arm": "d", "running_mean": 50.0}, unknown])


def test_bench_serving_takes_the_arguments(monkeypatch):
    """Its own parser accepts every option we give and reads what we mean."""
    from sglang.benchmark import serving

    seen = {}
    monkeypatch.setattr(serving, "run_benchmark", lambda args: seen.update(vars(args)))
    monkeypatch.setattr("sys.argv", ["x", *WORKLOADS["own8192"].priming.arguments("http://127.0.0.1:1", "m", "t")])
    serving.cli_main()
    expected = {"gsp_num_groups": 64, "gsp_prompts_per_group": 1, "gsp_system_prompt_len": 8192, "gsp_question_len": 64}
    expected |= {"gsp_output_len": 4, "max_concurrency": 8, "seed": 1, "warmup_requests": 0, "cache_report": True, "model": "m"}
    expected |= {"dataset_name": "generated-shared-prefix", "base_url": "http://127.0.0.1:1", "tokenize_prompt": True, "tokenizer": "t"}
    assert {key: seen[key] for key in expected} == expected


def prompts(wave: Wave) -> list[tuple[int, ...]]:
    """What the generator's stand-in for `generated-shared-prefix` sends, with a tokenizer of 1,000 words, two of them special."""
    tokenizer = SimpleNamespace(get_vocab=lambda: {str(word): word for word in range(1000)}, all_special_ids=[3, 4])
    lengths = {"prompts_per_group": wave.per_group, "system_prompt_len": wave.prefix, "question_len": wave.question}
    names = {"num_groups": wave.groups, **lengths, "output_len": wave.output}
    rows = TokenIdPrompts.from_args(Namespace(seed=wave.seed, **{f"gsp_{name}": n for name, n in names.items()})).load(tokenizer)
    assert all(row.prompt_len == len(row.prompt) == wave.prefix + wave.question for row in rows)
    assert all(row.output_len == wave.output and not {3, 4} & set(row.prompt) for row in rows)
    return [tuple(row.prompt) for row in rows]


def test_prefixes_of_one_seed_are_equal_and_questions_are_not():
    """What priming rests on."""
    measured, primed = prompts(Wave(3, 4, 50, 12, 2)), prompts(Wave(3, 2, 50, 7, 2))
    groups = [prompt[:50] for prompt in measured]
    assert len(measured) == len(set(measured)) == 12 and len(primed) == 6
    assert set(groups) == {prompt[:50] for prompt in primed} and sorted(map(groups.count, set(groups))) == [4, 4, 4]
    assert groups != sorted(groups, key=groups.index), "groups mix"
    assert not {prompt[50:57] for prompt in measured} & {prompt[50:] for prompt in primed}
    assert measured == prompts(Wave(3, 4, 50, 12, 2)) and not set(measured) & set(prompts(Wave(3, 4, 50, 12, 2, seed=7)))


def test_ratios_are_larger_where_ours_is_better():
    assert better("tpot_ms", 8.0, 4.0) == 2 and better("output_tok_s", 100.0, 300.0) == 3
    assert better("tpot_ms", 0.0, 4.0) is None and better("tpot_ms", 4.0, 0.0) is None


def rows_of(*measured):
    rows = []
    for name, workload, tpot, ttft, out in measured:
        arm = parse_arms(name)[0]
        rows.append(bench_serve._row(Session(arm, "shared", ()), WORKLOADS[workload], **figures(result(tpot, ttft, out))))
        rows[-1] |= {key: 1_000_000 for key in ("dense_tokens", "packed_tokens", "kv_bytes_used", "kv_bytes_allocated")}
        rows[-1] |= {"packed_tokens_read": 10, "packed_tokens_attended": 160, "start_s": 80.0}
        rows[-1] |= {"step_ms_full": 6.9, "running_mean": 64.0, "prefill_batches": 2}
    return rows


def test_the_best_vanilla_arm_counts_metric_by_metric(capsys):
    rows = rows_of(
        ("vanilla", "4x16", 8.0, 100.0, 7000.0),
        ("vanilla/fa3", "4x16", 9.0, 90.0, 6000.0),
        ("vanilla/flashinfer/fp8_e4m3", "4x16", 2.0, 10.0, 9000.0),
        ("exact", "4x16", 8.1, 100.0, 7000.0),
        ("hq4", "4x16", 5.0, 92.0, 9000.0),
        ("bf16", "4x16", 6.0, 91.0, 8000.0),
        ("hq4", "cold", 6.0, 91.0, 8000.0),
    )
    rows.append(bench_serve._row(Session(Arm("hq6"), "shared", ()), WORKLOADS["4x16"], failure="planted"))
    judge(rows)
    vanilla, fa3, fp8, exact, hq4, bf16, alone, broken = rows
    assert hq4["tpot_ms_vs_vanilla"] == 1.6 and hq4["ttft_ms_vs_vanilla"] == pytest.approx(90 / 92)
    assert hq4["tpot_ms_vs_fp8"] == 0.4 and fp8["tpot_ms_vs_vanilla"] == 4.0 and fp8["goals"] == []
    assert [goal["verdict"] for goal in hq4["goals"]] == ["met", "missed"]  # 90 / 92 is below 0.98
    assert [goal["verdict"] for goal in bf16["goals"]] == ["missed", "met"]
    assert exact["goals"] == [] and "goals" not in broken
    assert alone["tpot_ms_vs_vanilla"] is None and alone["goals"][0]["verdict"] == "no vanilla arm"
    show(rows, FACTS, TOKEN_BYTES)
    shown = capsys.readouterr().out
    assert "4x16, latency" in shown and "4x16, memory" in shown and "1.60x" in shown
    assert "tpot >= 1.45x met; ttft >= 0.98x missed" in shown and "4x16, hq6/flashinfer: FAILED: planted" in shown
    json.dumps(rows, allow_nan=False)


class FakeServer:
    """Answers as a server with `arm`'s pool would; `slots` and `backend` may be planted wrong."""

    start_s = 1.0

    def __init__(self, arm: Arm, slots=1000, backend=None, hq=None, fails=None, divisor=None):
        self.arm, self.slots, self.backend, self.hq, self.fails = arm, slots, backend or arm.backend, hq, fails
        self.held, self.flushed, self.stopped = slots * TOKEN_BYTES / (divisor or arm.bytes_divisor), 0, False
        self.counters = {"packed_tokens_read": 5, "packed_tokens_attended": 50}

    def start(self):
        if self.fails:
            raise ServerFailed(self.fails)

    def stop(self):
        self.stopped = True

    def flush_cache(self):
        self.flushed += 1

    def freeze_gc(self):
        self.frozen_after = self.flushed

    def log_text(self):
        return ""

    def server_info(self):
        if self.hq is None:
            return {"attention_backend": self.backend, "internal_states": [{}]}
        packed = {"bytes_used": 7, "bytes_allocated": 11, "pages_used": 3}
        block = {"active": True, "format": self.arm.format, "pack": "shared", "dense": {"bytes_allocated": 13}, "packed": packed}
        block["workspace_bytes"] = 17
        return {"attention_backend": self.backend, "internal_states": [{"hq": block | {"counters": dict(self.counters)} | self.hq}]}

    def metrics(self):
        values = {"max_total_num_tokens": self.slots, "kv_available_tokens": self.slots - 100}
        values["kv_cache_memory_usage_gb"] = self.held / 2**30
        return [Sample(f"sglang:{name}", {}, value) for name, value in values.items()]


class FakeClient:
    def __init__(self, *_):
        self.waves = []

    __enter__ = lambda self: self  # noqa: E731
    __exit__ = lambda self, *_: None  # noqa: E731

    def run(self, server, wave, model, tokenizer):
        self.waves.append(wave)
        server.counters["packed_tokens_read"] += 10
        server.counters["packed_tokens_attended"] += 160
        return result(completed=wave.requests)


def setup(tokens=1000):
    return Setup(MODEL, tokens, 0.5)


def test_a_pool_of_another_size_or_type_is_no_equal_budget():
    vanilla, fp8, hq = parse_arms("vanilla,vanilla/flashinfer/fp8_e4m3,hq4")
    check_pool(setup(), vanilla, FakeServer(vanilla))
    check_pool(setup(), fp8, FakeServer(fp8, slots=2000))
    check_pool(setup(), hq, FakeServer(hq, slots=500, hq={}))
    with pytest.raises(BenchError, match="too little GPU memory"):
        check_pool(setup(), vanilla, FakeServer(vanilla, slots=700))
    with pytest.raises(BenchError, match="is fp8_e4m3 in force"):
        check_pool(setup(), fp8, FakeServer(fp8, slots=2000, divisor=1))
    with pytest.raises(BenchError, match="the budget is 57,344,000"):
        check_pool(setup(), hq, FakeServer(hq, slots=500, hq={"workspace_bytes": 60_000_000}))
    with pytest.raises(BenchError, match="attention backend fa3"):
        check_pool(setup(), vanilla, FakeServer(vanilla, backend="fa3"))


def test_vanilla_with_our_plugin_and_ours_without_are_refused():
    vanilla, hq = parse_arms("vanilla,hq4")
    with pytest.raises(ABError, match="vanilla arm runs with our plugin"):
        check_pool(setup(), vanilla, FakeServer(vanilla, hq={}))
    with pytest.raises(ABError, match="without our plugin"):
        check_pool(setup(), hq, FakeServer(hq))
    with pytest.raises(ABError, match="format"):
        check_pool(setup(), hq, FakeServer(hq, hq={"format": "hq6"}))


def run_measure(monkeypatch, servers, together=1, repeats=1, client=None):
    client = client or FakeClient()
    monkeypatch.setattr(bench_serve, "LoadClient", lambda folder: client)
    made = iter(servers)
    monkeypatch.setattr(Setup, "server", lambda self, session, log: next(made))
    rows, loads = [], parse_workloads("4x16,cold")
    measure(replace(setup(), repeats=repeats), sessions([server.arm for server in servers], loads), together, Path("."), rows)
    return rows, client


@pytest.mark.parametrize("together", [1, 2])
def test_every_arm_gets_the_same_waves_and_counters_of_its_wave_only(monkeypatch, together):
    vanilla, hq = parse_arms("vanilla,hq4")
    servers = [FakeServer(vanilla), FakeServer(hq, slots=500, hq={})]
    rows, client = run_measure(monkeypatch, servers, together)
    each = [*WARM_UP, WORKLOADS["4x16"].priming, WORKLOADS["4x16"].wave, WORKLOADS["cold"].wave]
    assert client.waves == each * 2 and all(server.stopped and server.flushed == 2 for server in servers)
    assert [(row["arm"], row["workload"], row["failure"]) for row in rows] == [
        (arm.name, name, None) for arm in (vanilla, hq) for name in ("4x16", "cold")
    ]
    assert [row["packed_tokens_read"] for row in rows] == [0, 0, 10, 10]
    assert rows[2]["kv_bytes_used"] == 100 * TOKEN_BYTES + 7 and rows[2]["packed_tokens"] == 3 * 64
    assert rows[2]["kv_bytes_allocated"] == 13 + 11 + 17


def test_figures_are_medians_of_repeats_that_each_begin_with_an_empty_cache(monkeypatch):
    class Varying(FakeClient):
        def run(self, server, wave, model, tokenizer):
            answer = super().run(server, wave, model, tokenizer)
            measured = [w for w in self.waves if w == WORKLOADS["4x16"].wave]
            return answer | {"median_tpot_ms": {1: 9.0, 2: 5.0, 3: 7.0}.get(len(measured), 1.0)}

    vanilla = parse_arms("vanilla")[0]
    server = FakeServer(vanilla)
    rows, client = run_measure(monkeypatch, [server], repeats=3, client=Varying())
    assert server.flushed == 6 and server.frozen_after == 0
    assert client.waves[len(WARM_UP) :] == [WORKLOADS["4x16"].priming, WORKLOADS["4x16"].wave] * 3 + [WORKLOADS["cold"].wave] * 3
    assert (rows[0]["tpot_ms"], rows[0]["tpot_ms_of_each"], rows[0]["repeats"]) == (7.0, [9.0, 5.0, 7.0], 3)
    rows, _ = run_measure(monkeypatch, [FakeServer(vanilla)], repeats=2, client=Varying())
    assert rows[0]["tpot_ms"] == 7.0 and rows[0]["tpot_ms_of_each"] == [9.0, 5.0]


def test_an_arm_that_does_not_start_is_a_row_and_the_next_one_runs(monkeypatch, capsys):
    vanilla, hq = parse_arms("vanilla/triton,hq4")
    rows, _ = run_measure(monkeypatch, [FakeServer(vanilla, fails="out of memory"), FakeServer(hq, slots=500, hq={})])
    assert [row["failure"] for row in rows] == ["out of memory"] * 2 + [None] * 2
    assert "vanilla/triton" in capsys.readouterr().err


def test_a_backend_that_is_not_installed_is_named(monkeypatch, tmp_path):
    import importlib.machinery

    spec = importlib.machinery.ModuleSpec("sgl_kernel", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(bench_serve.importlib.util, "find_spec", lambda name: spec)
    assert "flash_ops" in missing_backend(Arm(None, "fa3")) and missing_backend(Arm(None, "triton")) is None
    (tmp_path / "flash_ops.abi3.so").touch()
    assert missing_backend(Arm(None, "fa3")) is None


def test_without_a_gpu_or_with_inherited_options_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BenchError, match="No CUDA device"):
        bench_serve.run()
    monkeypatch.setenv("SGLANG_HQ_FORMAT", "bf16")
    with pytest.raises(BenchError, match="would inherit"):
        bench_serve.run()


def test_the_dummy_model_needs_a_tokenizer(tmp_path):
    tokenizer, folder = tmp_path / "tokenizer", tmp_path / "model"
    tokenizer.mkdir(), folder.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    with pytest.raises(BenchError, match="has no tokenizer_config.json"):
        shape_with_dummy_weights(folder, tokenizer)
    (tokenizer / "tokenizer_config.json").write_text("{}")
    model = shape_with_dummy_weights(folder, tokenizer)
    assert model.token_bytes == TOKEN_BYTES and model.server_args == ["--load-format", "dummy"]
    assert json.loads((folder / "config.json").read_text())["num_key_value_heads"] == 4 and (folder / "tokenizer.json").exists()


def test_a_failing_generator_is_reported_with_its_log(tmp_path):
    """The real child process: the generator exits because nothing listens there."""
    server = FakeServer(Arm(None))
    server.url, server.check_alive = "http://127.0.0.1:9", lambda: None
    server.pause_scheduler = server.resume_scheduler = server.check_alive
    with LoadClient(tmp_path) as client:
        with pytest.raises(BenchError, match="bench_serving failed"):
            client.run(server, Wave(1, 1, 4, 4, 1), str(tmp_path), str(tmp_path))
    assert client.log.read_text()


def test_sigterm_ends_a_run_like_ctrl_c():
    before = signal.getsignal(signal.SIGTERM)
    cleaned = []
    with pytest.raises(SystemExit) as ended, terminated_like_interrupted():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            cleaned.append(True)
    assert ended.value.code == 128 + signal.SIGTERM and cleaned and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    "log, step_ms, running",
    [
        ("", None, None),
        # The first full window began before the batch was full; the prefill breaks the next one.
        ("D 3 900\nD 4 1000\nP 4\nD 4 500\nD 4 2000\nD 4 4000\nD 3 100\n", 1.5, 22 / 6),
        ("D 4 1000\nP 4\nD 4 1000\n", None, 4),
    ],
)
def test_steps_of_a_full_batch_come_from_windows_without_prefill(log, step_ms, running):
    lines = {"D": "[time] Decode batch, #running-req: {}, #token: 7, cuda graph: True, gen throughput (token/s): {}, #queue-req: 0",
             "P": "[time] Prefill batch, #new-seq: 1, #running-req: {}, input throughput (token/s): 9"}  # fmt: skip
    text = "\n".join(lines[line[0]].format(*line.split()[1:]) for line in log.splitlines())
    assert full_batch_step_ms(text, 4) == step_ms
    assert mean_running(text) == (running and pytest.approx(running))
