"""The gate's tiny Llama, and a GPT-2 of the same size: absolute positions, a transposed output projection."""

from __future__ import annotations

import shutil

import pytest
import torch

from ..gate.conftest import loaded, tiny_model

__all__ = ["loaded", "tiny_model"]


@pytest.fixture(scope="session")
def tiny_gpt2(tiny_model, tmp_path_factory):
    """Folder of the checkpoint: 2 layers, 4 heads of 16 channels, 512 positions, the tiny Llama's tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    for file in tiny_model.glob("token*"):
        shutil.copy(file, folder)
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=257, n_positions=512, n_embd=64, n_layer=2, n_head=4, initializer_range=0.15, bos_token_id=256, eos_token_id=256)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder
