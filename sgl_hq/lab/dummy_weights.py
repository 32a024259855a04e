"""A model that is nothing but its shape: times of decode steps depend on the shape alone, and no checkpoint has to be there."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sgl_hq.lab.errors import LabError


def model_with_dummy_weights(name: str, device: str) -> Any:
    """Random weights in bfloat16, in eval mode, made on `device`. name: a folder with config.json or a hub name. Raises LabError."""
    try:
        config = AutoConfig.from_pretrained(name)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise LabError(f"cannot make a model of the shape of {name!r}: give a folder with config.json or a hub name ({reason})") from error


def random_ids(model: Any, tokens: int) -> list[int]:
    """The same for the same vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.get_text_config().vocab_size, (tokens,), generator=generator).tolist()
