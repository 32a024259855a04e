"""Log-probabilities of a prompt's last tokens: no earlier token of an answer can move them, a foreign or missing prefix does."""

from __future__ import annotations

import httpx
import numpy as np

TAIL_TOKENS = 24
# Mean |difference|: int8, other batches and another order of bfloat16 sums stay near 0.02, a foreign or missing prefix is beyond 1.
SAME = 0.15


def body(tokens: list[int], new_tokens: int = 1) -> dict:
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    return {"input_ids": tokens, "return_logprob": True, "logprob_start_len": len(tokens) - TAIL_TOKENS, "sampling_params": sampling}


def send(server, tokens: list[int], new_tokens: int = 1) -> httpx.Response:
    return httpx.post(server.url + "/generate", json=body(tokens, new_tokens), timeout=600)


def logprobs(answer: httpx.Response) -> np.ndarray:
    """[TAIL_TOKENS - 1]: the first of the tail has no log-probability in this answer."""
    answer.raise_for_status()
    return np.array([entry[0] for entry in answer.json()["meta_info"]["input_token_logprobs"][1:]])


def distance(got: np.ndarray, cold: np.ndarray) -> float:
    """Mean |difference| of two tails."""
    assert len(got) == len(cold) == TAIL_TOKENS - 1
    return float(np.abs(got - cold).mean())
