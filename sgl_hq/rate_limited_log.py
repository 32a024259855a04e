"""Warnings that explain, at most one a minute of each kind, with a count of those left out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

PAUSE_S = 60.0


class RateLimitedLog:
    def __init__(self, logger: logging.Logger, level: int = logging.WARNING, clock: Callable[[], float] = time.monotonic):
        self._logger, self._level, self._clock = logger, level, clock
        self._last: dict[str, float] = {}
        self._left_out: dict[str, int] = {}

    def say(self, kind: str, sentence: Callable[[], str]) -> None:
        """Log `sentence()`, unless a sentence of this kind was logged within PAUSE_S."""
        now = self._clock()
        if now - self._last.get(kind, float("-inf")) < PAUSE_S:
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return
        left_out = self._left_out.pop(kind, 0)
        self._last[kind] = now
        self._logger.log(self._level, "%s%s", sentence(), f" ({left_out} more of this kind since the last line)" if left_out else "")
