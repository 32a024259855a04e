"""From the `hq` block to prometheus_client. The scheduler process is the only writer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sgl_hq.metrics.catalogue import CATALOGUE, COUNTER, GAUGE, HISTOGRAM, Metric


class Exporter:
    """One metric object per entry of the catalogue. Raises ValueError if the process has one of these names already.

    prometheus_client is imported here, not above: it reads PROMETHEUS_MULTIPROC_DIR on import, which SGLang sets late. With that
    variable, a scraping process sums files that others map: collectors that compute on demand, and Info, do not exist there.
    """

    def __init__(self) -> None:
        self._metrics = [(metric, _make(metric)) for metric in CATALOGUE]
        self._exported: dict[tuple[str, tuple[str, ...]], Any] = {}

    def export(self, hq: Mapping[str, Any]) -> None:
        """All metrics. hq: the block of /server_info; counters are totals in it, and what is new is added here."""
        for metric, target in self._metrics:
            for labels, value in metric.read(hq).items():
                self._put(metric, target.labels(*labels) if labels else target, (metric.name, labels), value)

    def export_at_once(self, hq: Mapping[str, Any]) -> None:
        """The `at_once` metrics alone; they have no labels. Reads no other part of `hq`."""
        for metric, target in self._metrics:
            if metric.at_once:
                target.set(metric.read(hq)[()])

    def _put(self, metric: Metric, target, key, value) -> None:
        if metric.kind == GAUGE:
            target.set(value)
            return
        before = self._exported.get(key)
        if value == before:
            return
        self._exported[key] = value
        if metric.kind == COUNTER:
            target.inc(value - (before or 0))
        else:
            _add_bins(target, value, before or {"counts": [0] * len(value["counts"]), "total": 0})


def _make(metric: Metric):
    from prometheus_client import Counter, Gauge, Histogram

    if metric.kind == GAUGE:
        return Gauge(metric.name, metric.help, metric.labels, multiprocess_mode="mostrecent")
    if metric.kind == COUNTER:
        return Counter(metric.name, metric.help, metric.labels)
    assert metric.kind == HISTOGRAM
    from sgl_hq.metrics.bins import GROUP_REQUESTS, SECONDS

    bounds = SECONDS if metric.name.endswith("_seconds") else GROUP_REQUESTS
    return Histogram(metric.name, metric.help, metric.labels, buckets=bounds)


def _add_bins(histogram, now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """prometheus_client takes values one by one; here thousands of one second arrive as counts, so its buckets are raised directly."""
    histogram._sum.inc(now["total"] - before["total"])
    for bucket, new, old in zip(histogram._buckets, now["counts"], before["counts"], strict=True):
        if new != old:
            bucket.inc(new - old)
