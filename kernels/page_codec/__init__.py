"""Packing whole KV pages into records and back. Layout: sgl_hq/page_format.py; derivations: kernels/README.md."""

from __future__ import annotations

from .reference import NonFiniteError, PageCodec

__all__ = ["NonFiniteError", "PageCodec"]
