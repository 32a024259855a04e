"""The lab's error, in a file of its own: commands import it without torch."""

from __future__ import annotations


class LabError(RuntimeError):
    """The lab could not measure. One sentence with the remedy; no verdict comes of it."""
