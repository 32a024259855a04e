"""The gate's error, in a file of its own: the command imports it without torch."""

from __future__ import annotations


class GateError(RuntimeError):
    """The gate could not measure. One sentence with the remedy; no verdict and no record come of it."""
