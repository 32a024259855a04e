"""Why a page cannot be packed. One base class: whatever the format, the caller keeps such pages dense."""

from __future__ import annotations

MAX_MAGNITUDE = 2.0**112  # about 5e33: spans and sums over head_dim stay far inside float32 and bfloat16


class UnpackablePageError(ValueError):
    """The format cannot hold these pages: keep them dense."""


class NonFiniteError(UnpackablePageError):
    """A lossy format met NaN, infinity, or a magnitude above MAX_MAGNITUDE."""


class EscapeOverflowError(UnpackablePageError):
    """A lossless page has more exponents outside its 4-bit window than its escape list holds."""
