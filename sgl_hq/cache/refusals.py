"""Why nodes were not packed: counted, and said in the log with what is missing and what to change."""

from __future__ import annotations

import logging

from sgl_hq.cache.pack_counters import PackCounters
from sgl_hq.page_format import PAGE_TOKENS
from sgl_hq.pool.packed_tier import PackedTier
from sgl_hq.rate_limited_log import RateLimitedLog

_MORE_MEMORY = "--max-total-tokens or --mem-fraction-static"


class RefusalLog:
    def __init__(self, counters: PackCounters, log: RateLimitedLog | None = None):
        self._counters = counters
        self._log = log if log is not None else RateLimitedLog(logging.getLogger(__name__))

    def no_room(self, pages: int, needed: int, tier: PackedTier, live_pages: int) -> None:
        """pages: of the node; needed: of these, at once (all, or 1 under pressure); live_pages: packed pages of running requests."""
        total, free, most = tier.pages_total, tier.pages_free, tier.sizes.packed_pages
        more_room = f"raise {_MORE_MEMORY}" if tier.elastic else f"raise --hq-packed-fraction, {_MORE_MEMORY}"
        there_are = f"{free} of {total} packed pages are free" + (", and the dense tier can spare no memory for more now" if total < most else "")
        what = f"sgl_hq: {pages} pages ({pages * PAGE_TOKENS} tokens) of a prefix are not packed"
        if needed > most:
            self._refuse("too_large", lambda: (
                f"{what}: the packed tier has {most} pages in all, {needed - most} too few. To pack such prefixes {more_room}"
            ))  # fmt: skip
        elif needed > free:
            self._refuse("no_pages", lambda: (
                f"{what}: {there_are}, {needed - free} are missing; {live_pages} are read by running requests, "
                f"{total - free - live_pages} were used later or lead to pages that were. To pack more {more_room}, or run fewer requests at once"
            ))  # fmt: skip
        else:
            sinks = tier.sizes.sinks
            self._refuse("no_sinks", lambda: (
                f"{what}: they begin a sequence, and all {sinks} slots for first tokens are taken, 1 is missing; {free} of {total} packed pages "
                f"are free, so packed prefixes are short. To pack more of them {more_room}, or choose a format without sinks (`sgl-hq formats`)"
            ))  # fmt: skip

    def unpackable(self, pages: int, reason: Exception) -> None:
        self._refuse("unpackable", lambda: (
            f"sgl_hq: {pages} pages ({pages * PAGE_TOKENS} tokens) of a prefix are not packed, now or later: {reason}. "
            "No room is missing; --hq-format bf16 holds all finite values"
        ))  # fmt: skip

    def _refuse(self, reason: str, sentence) -> None:
        self._counters.refused[reason] += 1
        self._log.say(reason, sentence)
