"""What packing costs in quality when served on a GPU: prompt log-probabilities against vanilla's, beside the gate's figures.

    QUALITY_MODEL=FOLDER [QUALITY_JSON=FILE] pytest -m gpu tests/gpu/test_served_quality_gpu.py -s

FOLDER: a checkpoint whose gate records are shipped (`sgl-hq demo-model --model qwen2.5-coder-0.5b`, or smollm2). Without it
the served part is skipped, and nothing is said about served quality.

The trials are the gate's own: its texts, a prefix of 1,024 tokens read from packed pages, 32 teacher-forced tokens after it.
A server answers with its best tokens only, so the divergence is that of the distributions over vanilla's best TOP tokens that
the other arm names too, and all others as one: never more than the whole one, and close to it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from sgl_hq.gate.bounds import STEPS
from sgl_hq.gate.model_digest import model_digest
from sgl_hq.gate.record import SHIPPED, read_record, record_path
from sgl_hq.gate.windows import shipped_windows
from sgl_hq.launch.server_process import ServerProcess

PREFIX, TOP = 1024, 512
FORMATS = ("hq6", "hq4")
ARMS = {
    "vanilla": [],
    "bf16": ["--hq-format", "bf16", "--hq-packed-fraction", "0.5"],  # the same values, another order of summation: the noise of the arithmetic
    **{fmt: ["--hq-format", fmt, "--hq-packed-fraction", "0.5", "--hq-allow-ungated"] for fmt in FORMATS},
    "fp8_e4m3": ["--kv-cache-dtype", "fp8_e4m3"],
}
ARGS = [
    "--attention-backend", "flashinfer", "--page-size", "64", "--max-total-tokens", "131072", "--mem-fraction-static", "0.9",
    "--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled", "--grammar-backend", "none",
    "--skip-server-warmup", "--random-seed", "0",
]  # fmt: skip

Step = dict[int, float]  # token id -> log-probability, of the best tokens


def divergence(p: Step, q: Step) -> float:
    """KL(p || q) in nats over the tokens that both name and "any other token"."""
    common = p.keys() & q.keys()
    shared = sum(math.exp(p[token]) * (p[token] - q[token]) for token in common)
    rest_p, rest_q = (max(1 - sum(math.exp(side[token]) for token in common), 1e-12) for side in (p, q))
    return shared + rest_p * math.log(rest_p / rest_q)


def test_divergence_is_the_whole_one_where_all_tokens_are_named():
    p, q = [0.5, 0.3, 0.2], [0.4, 0.4, 0.2]
    logs = [{i: math.log(x) for i, x in enumerate(side)} for side in (p, q)]
    whole = sum(x * math.log(x / y) for x, y in zip(p, q))
    assert divergence(*logs) == pytest.approx(whole, rel=1e-9)
    assert divergence(logs[0], logs[0]) == pytest.approx(0, abs=1e-9)
    cut = [{i: side[i] for i in (0, 1)} for side in logs]
    assert 0 < divergence(*cut) <= whole + 1e-9


def measure(server: ServerProcess, prompts: Sequence[list[int]]) -> list[Step]:
    """Steps of all prompts, each read after two requests have made its prefix a shared and, in a packing arm, packed one."""
    steps = []
    for ids in prompts:
        for tail in ids[PREFIX + 1 : PREFIX + 3]:
            _generate(server.url, [*ids[:PREFIX], tail], None)
        meta = _generate(server.url, ids, PREFIX)
        assert meta["cached_tokens"] == PREFIX
        top = meta["input_top_logprobs"][1:]  # nothing predicts the first one
        assert len(top) == STEPS
        steps += [{token: value for value, token, _ in entries} for entries in top]
    return steps


def _generate(url: str, ids: list[int], logprobs_from: int | None) -> dict:
    body = {"input_ids": ids, "sampling_params": {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}}
    if logprobs_from is not None:
        body |= {"return_logprob": True, "logprob_start_len": logprobs_from, "top_logprobs_num": TOP}
    return httpx.post(url + "/generate", json=body, timeout=300).raise_for_status().json()["meta_info"]


def served(model: str, prompts: Sequence[list[int]]) -> dict[str, list[Step]]:
    """All arms, side by side. Asserts that packed pages were read in the packing arms only."""
    with ExitStack() as stack, ThreadPoolExecutor(len(ARMS)) as pool:
        servers = {}
        for arm, options in ARMS.items():
            servers[arm] = ServerProcess(model, [*ARGS, *options], cpu=False, start_timeout_s=500, stop_grace_s=0)
            stack.callback(servers[arm].stop)
        for started in [pool.submit(server.start) for server in servers.values()]:
            started.result()
        out = dict(zip(servers, pool.map(lambda server: measure(server, prompts), servers.values()), strict=True))
        for arm, server in servers.items():
            hq = server.server_info()["internal_states"][0].get("hq")
            assert (hq is not None) == (arm in ("bf16", *FORMATS))
            assert hq is None or (hq["format"] == arm and hq["counters"]["packed_tokens_read"] >= len(prompts) * PREFIX)
    return out


@pytest.fixture(scope="module")
def quality_model() -> str:
    folder = os.environ.get("QUALITY_MODEL")
    if not folder:
        pytest.skip("QUALITY_MODEL names no checkpoint: what served formats do to quality was NOT measured in this run")
    assert Path(folder).is_dir(), f"QUALITY_MODEL={folder} is no folder"
    return folder


@pytest.mark.gpu
def test_served_divergence_agrees_with_the_gate(quality_model):
    """Expected is the gate's own figure for these trials plus the noise of bfloat16 arithmetic, which arm `bf16` shows.

    The two errors are independent, so their divergences add up in the mean; 416 steps leave some 20 % of sampling noise
    in each. Twice the noise and half as much again of the gate's figure bound it from above. From below, half of it.
    """
    from transformers import AutoTokenizer

    tokenizer, windows = AutoTokenizer.from_pretrained(quality_model), shipped_windows()
    prompts = [window.token_ids(tokenizer, PREFIX + STEPS + 1) for window in windows]
    steps = served(quality_model, prompts)
    means = {arm: sum(map(divergence, steps["vanilla"], other)) / len(other) for arm, other in steps.items() if arm != "vanilla"}
    digest = model_digest(quality_model)
    gate = {fmt: gate_figure(digest, fmt) for fmt in FORMATS}
    figures = {"model_digest": digest, "prefix": PREFIX, "steps": len(steps["vanilla"]), "served_kl": means, "gate_kl": gate}
    print("\nmean KL against vanilla, nats:", json.dumps(figures, indent=1))
    if os.environ.get("QUALITY_JSON"):
        Path(os.environ["QUALITY_JSON"]).write_text(json.dumps(figures, indent=1) + "\n")
    assert all(math.isfinite(kl) for kl in means.values())
    for fmt in FORMATS:
        assert 0.5 * gate[fmt] <= means[fmt] <= 1.5 * gate[fmt] + 2 * means["bf16"], fmt


def gate_figure(digest: str, fmt: str) -> float:
    """Mean KL of the shipped record's trials with our prefix length: the same texts and tokens as `prompts`."""
    trials = [trial for trial in read_record(record_path(SHIPPED, digest, fmt), digest, fmt).trials if trial.prefix_tokens == PREFIX]
    assert len(trials) == len(shipped_windows()) and all(trial.steps == STEPS for trial in trials)
    return sum(trial.kl_mean for trial in trials) / len(trials)
