"""`sglang.srt.layers.attention`: the user's backend becomes its HQ subclass."""

from __future__ import annotations

from sgl_hq.config import from_env


def install_backend(backend, runner, full_attn_backend):
    """AFTER attn_backend_wrapper; the object itself is changed (`attention/hq_attn_backend.py` install)."""
    from sgl_hq.attention.hq_attn_backend import install

    install(backend, packs=from_env().packs)
