"""Progress of a benchmark on stderr: one line for each step, with the seconds it took and a guess at what is left."""

from __future__ import annotations

import sys
import time


class Steps:
    """Counts steps of about equal length; a context-free, thread-free progress line that also suits a log file."""

    def __init__(self, total: int):
        self._total, self._done = total, 0
        self._start = self._last = time.monotonic()

    def done(self, what: str) -> None:
        """A step has ended."""
        now = time.monotonic()
        self._done += 1
        left = (now - self._start) / self._done * (self._total - self._done)
        took, self._last = now - self._last, now
        print(f"[{self._done}/{self._total}] {what}: {took:.1f} s, about {left:.0f} s left", file=sys.stderr, flush=True)
