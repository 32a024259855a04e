"""A tiny random Llama with a byte tokenizer, saved like any checkpoint: a full gate run on it takes seconds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sgl_hq.gate.bounds import PREFIX_TOKENS, STEPS
from sgl_hq.gate.figures import Trial
from sgl_hq.gate.record import GateRecord
from sgl_hq.gate.windows import CORE, HOLD_OUT, shipped_digest

TRIAL = Trial(
    window="wikitext-1", prefix_tokens=512, steps=STEPS, mse_max=0.2, mse_mean=0.01, variance_mse_max=0.1, topk_min=0.8,
    argmax_judged=30, argmax_equal=1.0, argmax_agreement=0.96875, rel_l2_max=0.1, kl_max=0.01, kl_mean=0.001, nll_dense=2.0,
    nll_packed=2.001, stored_bits=5.8, effective_bits=5.7,
)  # fmt: skip


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of the checkpoint: 2 layers, 4 query and 2 kv heads of 16 channels, 257 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=4096, initializer_range=0.15, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:  # random logits are flat: attention must not decide which ten are largest
        layer.self_attn.o_proj.weight.data *= 0.05
    model.to(torch.bfloat16).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<end>"])}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def loaded(tiny_model):
    from sgl_hq.gate.run import load_model

    return load_model(str(tiny_model))


def full_trials(**changed) -> tuple[Trial, ...]:
    """Passing trials of the whole gate; `changed` applies to the last one."""
    trials = [replace(TRIAL, window=w, prefix_tokens=n) for w in (*CORE, *HOLD_OUT) for n in PREFIX_TOKENS]
    return (*trials[:-1], replace(trials[-1], **changed))


def full_record(digest: str, fmt: str = "hq6", trials: tuple[Trial, ...] | None = None, **changed) -> GateRecord:
    record = GateRecord(
        model="tiny", model_digest=digest, format=fmt, trials=trials or full_trials(), date="2026-01-02T03:04:05+00:00",
        versions={"torch": "2"}, windows_digest=shipped_digest(),
    )  # fmt: skip
    return replace(record, **changed)
