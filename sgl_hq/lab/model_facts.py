"""What the lab asks a transformers model about itself."""

from __future__ import annotations

from typing import Any

from sgl_hq.lab.errors import LabError


def head_dim(model: Any) -> int:
    """Channels of one K head."""
    config = model.config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def check_context(model: Any, tokens: int) -> None:
    """Raises LabError where the model has fewer positions than the context and its steps need."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise LabError(f"the model's context is {limit} tokens, --context and the steps need {tokens}: give a shorter --context")
