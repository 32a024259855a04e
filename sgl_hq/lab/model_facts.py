"""What the lab asks a transformers model about itself."""

from __future__ import annotations

from typing import Any

import torch

from sgl_hq.lab.errors import LabError


def head_dim(model: Any) -> int:
    """Channels of one K head."""
    config = model.config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def device_facts(device: torch.device) -> dict[str, Any]:
    """`device`, and what a time on it depends on: the GPU's name, or the threads of PyTorch."""
    if device.type == "cuda":
        return {"device": device.type, "gpu": torch.cuda.get_device_name(device)}
    return {"device": device.type, "threads": torch.get_num_threads()}


def check_context(model: Any, tokens: int) -> None:
    """Raises LabError where the model has fewer positions than the context and its steps need."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise LabError(f"the model's context is {limit} tokens, --context and the steps need {tokens}: give a shorter --context")
