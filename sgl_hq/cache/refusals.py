"""Why nodes were not packed: counted, and said in the log with what is missing and what to change."""

from __future__ import annotations

import logging

from sgl_hq.cache.pack_counters import PackCounters
from sgl_hq.page_format import PAGE_TOKENS
from sgl_hq.pool.packed_tier import PackedTier
from sgl_hq.rate_limited_log import RateLimitedLog

_MORE_ROOM = "raise --hq-packed-fraction, --max-total-tokens or --mem-fraction-static"


class RefusalLog:
    def __init__(self, counters: PackCounters, log: RateLimitedLog | None = None):
        self._counters = counters
        self._log = log if log is not None else RateLimitedLog(logging.getLogger(__name__))

    def no_room(self, pages: int, needed: int, tier: PackedTier, live_pages: int) -> None:
        """pages: of the node; needed: of these, at once (all, or 1 under pressure); live_pages: packed pages of running requests."""
        total, free = tier.sizes.packed_pages, tier.pages_free
        what = f"sgl_hq: {pages} pages ({pages * PAGE_TOKENS} tokens) of a prefix are not packed"
        if needed > total:
            self._refuse("too_large", lambda: (
                f"{what}: the packed tier has {total} pages in all, {needed - total} too few. To pack such prefixes {_MORE_ROOM}"
            ))  # fmt: skip
        elif needed > free:
            self._refuse("no_pages", lambda: (
                f"{what}: {free} of {total} packed pages are free, {needed - free} are missing; {live_pages} are read by running requests, "
                f"{total - free - live_pages} were used later or lead to pages that were. To pack more {_MORE_ROOM}, or run fewer requests at once"
            ))  # fmt: skip
        else:
            sinks = tier.sizes.sinks
            self._refuse("no_sinks", lambda: (
                f"{what}: they begin a sequence, and all {sinks} slots for first tokens are taken, 1 is missing; {free} of {total} packed pages "
                f"are free, so packed prefixes are short. To pack more of them {_MORE_ROOM}, or choose a format without sinks (`sgl-hq formats`)"
            ))  # fmt: skip

    def unpackable(self, pages: int, reason: Exception) -> None:
        self._refuse("unpackable", lambda: (
            f"sgl_hq: {pages} pages ({pages * PAGE_TOKENS} tokens) of a prefix are not packed, now or later: {reason}. "
            "No room is missing; --hq-format bf16 holds all finite values"
        ))  # fmt: skip

    def _refuse(self, reason: str, sentence) -> None:
        self._counters.refused[reason] += 1
        self._log.say(reason, sentence)
