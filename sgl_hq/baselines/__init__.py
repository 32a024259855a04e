"""Packed codecs of the literature and of earlier work, for the evidence tables; none of them is served."""

from __future__ import annotations

from .registry import BASELINES

__all__ = ["BASELINES"]
