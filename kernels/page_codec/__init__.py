"""Packing whole KV pages into records and back. Layout: sgl_hq/page_format.py; derivations: kernels/README.md."""

from __future__ import annotations

from .errors import EscapeOverflowError, NonFiniteError, UnpackablePageError
from .reference import PageCodec

__all__ = ["EscapeOverflowError", "NonFiniteError", "PageCodec", "UnpackablePageError"]
