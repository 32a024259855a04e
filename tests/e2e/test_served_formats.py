"""Packed formats through every way of starting a server: what is packed, what it costs, what is answered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import openai
import pydoc_data.topics
import pytest

from sgl_hq.config import HQConfig
from sgl_hq.gate.admission import gate_state
from sgl_hq.launch.server_process import ServerProcess
from sgl_hq.page_format import get_format

ARGS = ["--max-total-tokens", "12288", "--grammar-backend", "none", "--enable-cache-report"]
QUESTIONS = ["What is an assignment statement?", "What is a target list?", "Can I assign to an attribute?", "What is augmented assignment?"]
SYSTEM = "You are a Python tutor. Answer from this text.\n" + pydoc_data.topics.topics["assignment"][:2500]


def _ask(url: str, question: str):
    client = openai.OpenAI(base_url=url + "/v1", api_key="none")
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    return client.chat.completions.create(
        model="m", messages=messages, max_tokens=24, temperature=0, logprobs=True, extra_body={"ignore_eos": True}
    )


def _logprobs(answer) -> list[float]:
    return [token.logprob for token in answer.choices[0].logprobs.content]


def _state(server) -> dict:
    return server.server_info()["internal_states"][0]["hq"]


@pytest.fixture(scope="module")
def vanilla_answers(model):
    with ServerProcess(str(model), [*ARGS, "--page-size", "64"], stop_grace_s=0) as server:
        return [_ask(server.url, q) for q in QUESTIONS]


def _start(model, way: str, options: list[str], env: dict[str, str]) -> ServerProcess:
    """The three documented ways; all end in the same server."""
    server = ServerProcess(str(model), [*ARGS, *options], env=env, stop_grace_s=0)
    bin_dir = Path(sys.executable).parent
    if way == "sgl-hq serve":
        server.argv[:3] = [str(bin_dir / "sgl-hq"), "serve"]
    elif way == "sglang serve":
        server.argv[:3] = [str(bin_dir / "sglang"), "serve"]
    return server


CASES = [
    # format, way, flags, environment, largest mean |logprob difference| to vanilla over the common start of the answers.
    # bf16 stores the same bits, but sums in another order: 2**-8 relative on logits of size ~20.
    # int8 and hq6: KL .0002 and .0005 on this model (formats.md), about the square of the mean difference: .015 and .025.
    ("bf16", "sgl-hq serve", ["--hq-format", "bf16"], {}, 0.08),
    ("int8", "sglang serve", [], {"SGLANG_HQ_FORMAT": "int8", "SGLANG_HQ_PACK": "insert", "SGLANG_HQ_ALLOW_UNGATED": "1"}, 0.08),
    ("hq6", "python -m sglang.launch_server", ["--hq-format", "hq6", "--hq-packed-fraction", "0.4", "--hq-allow-ungated"], {}, 0.10),
]


@pytest.mark.parametrize("fmt, way, options, env, bound", CASES, ids=[f"{c[0]} by {c[1]}" for c in CASES])
def test_shared_pages_are_packed_and_answers_hold(model, vanilla_answers, fmt, way, options, env, bound):
    with _start(model, way, options, env) as server:
        first = _ask(server.url, QUESTIONS[0])
        after_first = _state(server)
        answers = [first, *(_ask(server.url, q) for q in QUESTIONS[1:])]
        state = _state(server)

    assert (state["active"], state["format"]) == (True, fmt)
    assert state["gate"] == gate_state(HQConfig(fmt), str(model)).describe()
    prefix_pages = answers[1].usage.prompt_tokens_details.cached_tokens // 64
    assert prefix_pages >= 6, "the questions share a prefix of several pages"
    if env.get("SGLANG_HQ_PACK") == "insert":
        assert after_first["packed"]["pages_used"] >= prefix_pages
    else:
        assert after_first["packed"]["pages_used"] == 0, "nothing is shared yet"
        assert state["packed"]["pages_used"] == prefix_pages
    assert state["counters"]["packed_tokens_read"] > 0

    layout = get_format(fmt).layout(64, 64)
    stored = state["packed"]["bytes_used"] / (state["packed"]["pages_used"] * 64 * 30 * 3 * 128) * 8
    assert stored == pytest.approx(layout.stored_bits_per_value(state["packed"]["pages_used"] * 64), rel=1e-9)

    differences, compared = 0.0, 0
    for ours, theirs in zip(answers, vanilla_answers):
        for a, b in zip(ours.choices[0].logprobs.content, theirs.choices[0].logprobs.content):
            if a.token != b.token:
                break
            differences, compared = differences + abs(a.logprob - b.logprob), compared + 1
    assert compared >= 48, "answers part from vanilla's too early to compare"
    assert differences / compared < bound
    if fmt == "hq6":
        assert differences > 0, "a lossy format that changes nothing was not used"


UNGATED = "sink2-K7V7"  # no record of it is shipped

ENGINE = """
import json, sys
import sglang as sgl

if __name__ == "__main__":
    engine = sgl.Engine(model_path=sys.argv[1], device="cpu", max_total_tokens=8192, grammar_backend="none", log_level="error")
    prefix = list(range(1000, 1300))
    for tail in ([5, 6, 7], [8, 9], [11]):
        engine.generate(input_ids=prefix + tail, sampling_params={"max_new_tokens": 4, "temperature": 0})
    state = engine.get_server_info()["internal_states"][0]["hq"]
    print("STATE " + json.dumps(state))
    engine.shutdown()
"""


def test_sgl_engine_with_the_environment_alone(model, tmp_path):
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    env = os.environ | {"SGLANG_HQ_FORMAT": UNGATED, "SGLANG_HQ_ALLOW_UNGATED": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, str(script), str(model)], env=env, capture_output=True, text=True, timeout=300)
    lines = [line for line in run.stdout.splitlines() if line.startswith("STATE ")]
    assert lines, run.stderr[-3000:]
    state = json.loads(lines[0][6:])
    assert state["format"] == UNGATED and state["packed"]["pages_used"] == 4
    assert state["gate"]["verdict"] == "ungated" and f"--format {UNGATED}" in state["gate"]["reason"]


def test_sgl_engine_refuses_with_an_exception(model, tmp_path):
    script = tmp_path / "engine.py"
    script.write_text(ENGINE.replace('device="cpu"', 'device="cpu", enable_hierarchical_cache=True'))
    env = os.environ | {"SGLANG_HQ_FORMAT": "hq6", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, str(script), str(model)], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode != 0 and "HQConfigError: HiCache cannot be combined" in run.stderr
