"""Mode `exact` on a GPU: log-probabilities equal to vanilla's, per attention backend, CUDA graphs on.

Marked `gpu` and left out unless asked for by `-m gpu` (pyproject.toml): it needs a CUDA device. Random weights, equal in
both servers: bit equality needs no trained model.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import httpx
import pytest
from fleet import VOCAB, Arm

from sgl_hq.launch.server_process import ServerProcess

pytestmark = pytest.mark.gpu


class Pair(NamedTuple):
    backend: str

    @property
    def arms(self) -> tuple[Arm, Arm]:
        return Arm(self.backend), Arm(self.backend, "exact")


def _measure(server: ServerProcess) -> list:
    """One request at a time, so that both servers build the same batches: cold, half shared, and again from the cache."""
    rng = random.Random(5)
    tokens = [rng.randrange(10, VOCAB - 10) for _ in range(4096)]
    out = []
    for ids, start in [(tokens, 0), (tokens[:2048] + tokens[:300], 2049), (tokens, 4080)]:
        body = {"input_ids": ids, "return_logprob": True, "logprob_start_len": start,
                "sampling_params": {"temperature": 0, "max_new_tokens": 64, "ignore_eos": True}}
        answer = httpx.post(server.url + "/generate", json=body, timeout=300)
        answer.raise_for_status()
        meta = answer.json()["meta_info"]
        out.append([entry[:2] for entry in meta["input_token_logprobs"][1:] + meta["output_token_logprobs"]])
    return out


@pytest.mark.parametrize("pair", [Pair("flashinfer"), Pair("triton")], ids=lambda pair: pair.backend)
def test_exact_is_bit_identical_to_vanilla(fleet, pair):
    vanilla, exact = (fleet.server(arm) for arm in pair.arms)
    states = [server.server_info()["internal_states"][0].get("hq") for server in (vanilla, exact)]
    assert states[0] is None and states[1]["active"] and states[1]["format"] == "exact"
    expected = _measure(vanilla)
    assert len(expected[0]) == 4095 + 64
    assert _measure(exact) == expected
