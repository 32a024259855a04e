"""Gauges of the packed tier on SGLang's /metrics. Names and units; written by the scheduler process only."""

from __future__ import annotations

PACKED_PAGES = "sglang:hq_packed_pages_used"
PACKED_BYTES = "sglang:hq_packed_bytes_used"


class PackedTierGauges:
    """Pages and bytes (records and sinks) the packed tier holds, set whenever they change.

    prometheus_client is imported here, not above: it reads PROMETHEUS_MULTIPROC_DIR on import, which SGLang sets late.
    """

    def __init__(self) -> None:
        from prometheus_client import Gauge

        self._pages = Gauge(PACKED_PAGES, "Pages in the packed tier.", multiprocess_mode="mostrecent")
        self._bytes = Gauge(PACKED_BYTES, "Bytes of the packed tier that hold KV.", multiprocess_mode="mostrecent")

    def set(self, pages: int, used_bytes: int) -> None:
        self._pages.set(pages)
        self._bytes.set(used_bytes)
