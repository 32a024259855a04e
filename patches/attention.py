"""`sglang.srt.layers.attention`: the user's backend becomes its HQ subclass."""

from __future__ import annotations

from sgl_hq.config import from_env


def install_backend(backend, runner, full_attn_backend):
    """AFTER attn_backend_wrapper; the object itself is changed (`attention/hq_attn_backend.py` install)."""
    from sglang.srt.runtime_context import get_parallel

    from sgl_hq.attention.hq_attn_backend import install

    q_heads = runner.model_config.num_attention_heads // get_parallel().attn_tp_size
    install(backend, from_env().packs, q_heads, eager_rows=eager_rows(runner.server_args))


def eager_rows(server_args) -> int:
    """Most query tokens of one eager forward: a prefill chunk, or a whole prompt where prefill is not chunked."""
    chunk = server_args.chunked_prefill_size
    return chunk if chunk is not None and chunk > 0 else server_args.max_prefill_tokens
