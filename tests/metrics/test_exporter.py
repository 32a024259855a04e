"""What was counted as plain numbers arrives at prometheus_client, once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgl_hq.metrics.bins import GROUP_REQUESTS, NO_GROUPS, NO_TIMES, Bins
from sgl_hq.metrics.catalogue import CATALOGUE, LENT_PAGES, PACKED_BYTES, PACKED_PAGES, PAGES, REFUSALS


@given(st.lists(st.integers(1, 400)))
def test_bins_count_every_value_once_under_its_bound(values):
    bins = Bins.of(GROUP_REQUESTS, values)
    assert sum(bins.counts) == len(values) and bins.total == sum(values)
    for i, bound in enumerate(GROUP_REQUESTS):  # cumulative, as Prometheus shows them
        assert sum(bins.counts[: i + 1]) == sum(v <= bound for v in values)
    one_by_one = NO_GROUPS
    for value in values:
        one_by_one = one_by_one.with_value(value)
    assert one_by_one == bins == NO_GROUPS + bins


def block(groups=(), packs=(), read=0, refused=0, pages=0):
    tier = {f"{what}_{state}": pages for what in ("pages", "bytes") for state in ("free", "live", "cached", "used")}
    return {
        "version": "1", "format": "hq6", "pack": "shared", "gate": {"verdict": "passed"}, "layout_version": 1,
        "dense": tier, "packed": tier | {"sinks_free": 1, "sinks_used": 2, "dense_pages_lent": 5}, "packed_token_fraction": 0.5, "reuse_factor": 2.0,
        "live_requests": 3, "workspace_bytes": 4,
        "counters": {
            "pages_packed": 9, "pages_demoted": 2, "pages_dropped": 3, "dense_pages_dropped": 4, "slabs_lent": 3, "slabs_reclaimed": 1, "refused": {"no_pages": refused},
            "packed_tokens_read": read, "packed_tokens_attended": 2 * read,
        },
        "group_requests": Bins.of(GROUP_REQUESTS, groups).describe(),
        "seconds": {"pack": Bins.of(NO_TIMES.bounds, packs).describe()},
        "audit": {"audits": 0, "seconds": 0.0, "findings": {"tree": 0}},
    }  # fmt: skip


@pytest.fixture
def exporter():
    import prometheus_client

    from sgl_hq.metrics.exporter import Exporter

    exporter = Exporter()
    yield exporter
    for _, target in exporter._metrics:
        prometheus_client.REGISTRY.unregister(target)


def sample(name, **labels):
    import prometheus_client

    return prometheus_client.REGISTRY.get_sample_value(name, labels)


def test_every_export_adds_only_what_is_new(exporter):
    exporter.export(block(groups=[1, 16, 16], packs=[0.02], read=640, refused=1, pages=5))
    exporter.export(block(groups=[1, 16, 16, 300], packs=[0.02, 5.0], read=1280, refused=1, pages=4))
    exporter.export(block(groups=[1, 16, 16, 300, 16], packs=[0.02, 5.0], read=1280, refused=4, pages=4))
    assert sample("sglang:hq_packed_tokens_read_total") == 1280 and sample("sglang:hq_packed_tokens_attended_total") == 2560
    assert sample(REFUSALS, reason="no_pages") == 4
    assert sample(PAGES, tier="dense", state="live") == 4
    buckets = {le: sample("sglang:hq_group_requests_bucket", le=le) for le in ("1.0", "8.0", "16.0", "256.0", "+Inf")}
    assert buckets == {"1.0": 1, "8.0": 1, "16.0": 4, "256.0": 4, "+Inf": 5}
    assert (sample("sglang:hq_group_requests_sum"), sample("sglang:hq_group_requests_count")) == (349, 5)
    assert sample("sglang:hq_operation_seconds_sum", operation="pack") == pytest.approx(5.02)
    assert sample("sglang:hq_operation_seconds_bucket", operation="pack", le="3.0") == 1
    assert sample("sglang:hq_pages_moved_total", operation="pack") == 7, "demoted pages are counted as such"
    assert sample("sglang:hq_info", version="1", format="hq6", pack="shared", gate="passed", layout_version="1") == 1


def test_figures_of_the_packed_tier_are_set_at_once(exporter):
    exporter.export_at_once({"packed": {"pages_used": 7, "bytes_used": 700, "dense_pages_lent": 320}})
    assert (sample(PACKED_PAGES), sample(PACKED_BYTES)) == (7, 700)
    assert {m.name for m in CATALOGUE if m.at_once} == {PACKED_PAGES, PACKED_BYTES, LENT_PAGES}


class Spy:
    def __init__(self):
        self.full, self.at_once = 0, 0

    def export(self, _hq):
        self.full += 1

    def export_at_once(self, _hq):
        self.at_once += 1


def test_a_busy_server_exports_once_a_second_and_an_idle_one_once(monkeypatch):
    from types import SimpleNamespace

    from sgl_hq import monitor, server_state

    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(monitor.time, "monotonic", lambda: now.s)
    monkeypatch.setattr(server_state, "figures", lambda *_: {})
    monkeypatch.setattr(server_state, "packed_in_use", lambda *_: {})
    tree, spy = SimpleNamespace(), Spy()
    watch = monitor.Monitor(server_state.Sources(tree, None, None, {}), spy, None)
    for _ in range(100):  # 1.98 s of batches
        watch.batch_done()
        now.s += 0.02
    assert spy.full == 2
    for _ in range(1000):
        watch.idle()
    assert spy.full == 3, "what the last batches changed is shown, and then nothing changes"
    tree.tier_changed()  # a flush
    watch.idle()
    assert (spy.full, spy.at_once) == (4, 1)
