"""Mode `exact` on a GPU: log-probabilities equal to vanilla's, per attention backend, CUDA graphs on.

Marked `gpu` and left out unless asked for by `-m gpu` (pyproject.toml): it needs a CUDA device. Weights are dummies
of SmolLM2's shape (seeded, so equal in both servers): bit equality needs no trained model.
"""

from __future__ import annotations

import json
import random

import httpx
import pytest

from sgl_hq.launch.server_process import ServerProcess

pytestmark = pytest.mark.gpu

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "tie_word_embeddings": True, "hidden_act": "silu", "torch_dtype": "bfloat16",
    "bos_token_id": 1, "eos_token_id": 2,
}
ARGS = ["--load-format", "dummy", "--skip-tokenizer-init", "--page-size", "64", "--max-total-tokens", "65536", "--random-seed", "0",
        "--grammar-backend", "none", "--mem-fraction-static", "0.5"]


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2-shape")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def _measure(server: ServerProcess) -> list:
    """One request at a time, so that both servers build the same batches: cold, half shared, and again from the cache."""
    rng = random.Random(5)
    tokens = [rng.randrange(10, 49000) for _ in range(4096)]
    out = []
    for ids, start in [(tokens, 0), (tokens[:2048] + tokens[:300], 2049), (tokens, 4080)]:
        body = {"input_ids": ids, "return_logprob": True, "logprob_start_len": start,
                "sampling_params": {"temperature": 0, "max_new_tokens": 64, "ignore_eos": True}}
        answer = httpx.post(server.url + "/generate", json=body, timeout=300)
        answer.raise_for_status()
        meta = answer.json()["meta_info"]
        out.append([entry[:2] for entry in meta["input_token_logprobs"][1:] + meta["output_token_logprobs"]])
    return out


@pytest.mark.parametrize("backend", ["flashinfer", "triton"])
def test_exact_is_bit_identical_to_vanilla(shape, backend):
    results, states = {}, {}
    for arm, options in [("vanilla", []), ("exact", ["--hq-format", "exact"])]:
        args = [*ARGS, "--attention-backend", backend, *options]
        with ServerProcess(str(shape), args, cpu=False, start_timeout_s=400, stop_grace_s=0) as server:
            results[arm] = _measure(server)
            states[arm] = server.server_info()["internal_states"][0].get("hq")
    assert states["vanilla"] is None and states["exact"]["active"] and states["exact"]["format"] == "exact"
    assert len(results["vanilla"][0]) == 4095 + 64
    assert results["vanilla"] == results["exact"]
