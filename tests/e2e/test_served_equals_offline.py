"""What the server computes from packed pages is what HQCache computes from them: the gate judges what is served."""

from __future__ import annotations

from pathlib import Path

import httpx
import pydoc_data.topics
import pytest
import tolerances
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache

from sgl_hq.calibration.sensitivity import Sensitivity
from sgl_hq.calibration.store import Calibration, SideCalibration, calibration_path
from sgl_hq.calibration.transform import fit_transform
from sgl_hq.gate.codecs import codec_of
from sgl_hq.gate.model_digest import model_digest
from sgl_hq.hq_cache import HQCache
from sgl_hq.launch.server_process import ServerProcess

PREFIX_TOKENS, STEPS, RUNNERS_UP = 512, 16, 5
ARGS = ["--max-total-tokens", "8192", "--grammar-backend", "none", "--page-size", "64"]
FLOAT32 = ["--dtype", "float32", "--kv-cache-dtype", "bfloat16"]  # both arms: no arithmetic noise beside float32's


@pytest.fixture(scope="module")
def calibrated_home(model, tmp_path_factory) -> dict[str, str]:
    """An environment whose cache folder holds a calibration of random numbers: any basis must give equal results."""
    home = tmp_path_factory.mktemp("cache")
    generator = torch.Generator().manual_seed(0)

    def random_side() -> SideCalibration:
        root = torch.randn(2, 30, 3, 64, 128, generator=generator, dtype=torch.float64)
        metric, covariance = root @ root.mT
        return SideCalibration(*fit_transform(Sensitivity(metric, covariance)))

    digest = model_digest(str(model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_HQ_CACHE", str(home))
        path = calibration_path(digest)
    Calibration(digest, random_side(), random_side(), {"windows": "none"}).save(path)
    return {"SGLANG_HQ_CACHE": str(home), "path": str(path)}


@pytest.fixture(scope="module")
def prompt(model) -> list[int]:
    ids = AutoTokenizer.from_pretrained(model)(pydoc_data.topics.topics["assignment"])["input_ids"]
    return ids[: PREFIX_TOKENS + 3]


def _served(model, prompt, options, env) -> list[dict[int, float]]:
    """Log-probabilities of the best tokens at each step, from the server, after two requests have made the prefix shared."""
    with ServerProcess(str(model), [*ARGS, *FLOAT32, *options, "--hq-allow-ungated"], env=env, stop_grace_s=0) as server:
        for tail in prompt[PREFIX_TOKENS + 1 :]:
            _generate(server.url, [*prompt[:PREFIX_TOKENS], tail], 1)
        answer = _generate(server.url, prompt[: PREFIX_TOKENS + 1], STEPS)
        state = server.server_info()["internal_states"][0]["hq"]
    assert state["packed"]["pages_used"] == PREFIX_TOKENS // 64 and state["counters"]["packed_tokens_read"] > 0
    return [{token: value for value, token, _ in step} for step in answer["meta_info"]["output_top_logprobs"]]


def _generate(url: str, ids: list[int], new_tokens: int) -> dict:
    body = {
        "input_ids": ids, "return_logprob": True, "top_logprobs_num": RUNNERS_UP,
        "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
    }  # fmt: skip
    return httpx.post(url + "/generate", json=body, timeout=120).raise_for_status().json()


@torch.inference_mode()
def _offline(model, prompt, codec) -> list[torch.Tensor]:
    """The same steps through transformers, greedily. `[vocabulary]` log-probabilities of each."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prefill = DynamicCache()  # as in the server, the prefill attends to K and V that are not rounded yet
    network(torch.tensor([prompt[:PREFIX_TOKENS]]), past_key_values=prefill)
    cache = HQCache(codec)
    for index, layer in enumerate(prefill.layers):
        cache.update(layer.keys, layer.values, index)
    assert cache.pack() == PREFIX_TOKENS
    token, steps = prompt[PREFIX_TOKENS], []
    for _ in range(STEPS):
        steps.append(network(torch.tensor([[token]]), past_key_values=cache).logits[0, -1].log_softmax(-1))
        token = int(steps[-1].argmax())
    return steps


@pytest.mark.parametrize("fmt", ["hq6", "calib4.5"])
def test_log_probabilities_agree(model, prompt, calibrated_home, fmt):
    served = _served(model, prompt, ["--hq-format", fmt], {"SGLANG_HQ_CACHE": calibrated_home["SGLANG_HQ_CACHE"]})
    offline = _offline(model, prompt, codec_of(fmt, Path(calibrated_home["path"])))
    dense = _offline(model, prompt, codec_of("bf16"))
    assert len(served) == STEPS
    difference = max(abs(float(step[t]) - p) for s, step in zip(served, offline, strict=True) for t, p in s.items())
    effect = max(abs(float(step[t] - other[t])) for s, step, other in zip(served, offline, dense) for t in s)
    print(f"{fmt}: served against offline {difference:.2e} nats, packing itself {effect:.2e}")
    assert difference <= tolerances.SERVED_AGAINST_OFFLINE * effect
