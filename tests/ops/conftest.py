"""Fixtures of the codec tests. `page_samples`, `codec_checks` and `tolerances` are importable below this folder."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # importmode importlib adds neither

_WINDOW_TOKENS = 1024
_WINDOWS = 7  # 16 pages of 64 tokens each, x 30 layers x 3 kv heads = 10,080 pages of SmolLM2-135M


@pytest.fixture
def poisoned_memory(monkeypatch):
    """torch.empty gives 0xFF bytes (NaN as a float): an output value that nobody wrote cannot pass."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        tensor.view(torch.uint8).fill_(255) if tensor.numel() else None
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(scope="session")
def real_pages() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """10,080 pages (a page is one kv head) of SmolLM2-135M on Python's own code and prose: per layer k, v
    `[112, 64, 3, 64] bfloat16`, K after RoPE."""
    import argparse
    import difflib
    from pydoc_data import topics

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sgl_hq.launch.demo_model import ensure_demo_model

    path = ensure_demo_model()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).model
    texts = (inspect.getsource(argparse), "\n".join(topics.topics.values())[:50_000], inspect.getsource(difflib))
    windows = [tokenizer(text, return_tensors="pt").input_ids[0].split(_WINDOW_TOKENS)[:3] for text in texts]
    windows = [ids for of_text in windows for ids in of_text][:_WINDOWS]
    with torch.inference_mode():
        caches = [model(ids[None], use_cache=True).past_key_values.layers for ids in windows]

    def pages(states: list[torch.Tensor]) -> torch.Tensor:
        by_token = torch.cat(states, 2)[0].transpose(0, 1)  # [1, H, T, D] each -> [T, H, D]
        return by_token.bfloat16().unflatten(0, (-1, 64)).clone()

    return [(pages([layer.keys for layer in same]), pages([layer.values for layer in same])) for same in zip(*caches)]
