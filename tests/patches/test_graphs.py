"""Every decode graph is captured in a stock and a packed variant, and the batch decides which one is replayed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sgl_hq.patches import graphs


def _capture(monkeypatch, fmt, label):
    monkeypatch.setenv("SGLANG_HQ_FORMAT", fmt)
    seen = []
    backend = SimpleNamespace(captures_packed_variant=False)
    runner = SimpleNamespace(attn_backend=backend)
    stock = lambda _runner, size, _forward, stream, label: seen.append((size, stream, label, backend.captures_packed_variant))
    graphs.capture_both_variants(stock, runner, 4, None, None, label)
    assert not backend.captures_packed_variant
    return seen


def test_stock_first_then_packed(monkeypatch):
    assert _capture(monkeypatch, "bf16", None) == [(4, None, None, False), (4, None, "packed", True)]
    assert _capture(monkeypatch, "bf16", "nolora") == [(4, None, "nolora", False), (4, None, "packed nolora", True)]


def test_exact_has_no_second_variant(monkeypatch):
    assert _capture(monkeypatch, "exact", None) == [(4, None, None, False)]


def test_a_failed_capture_leaves_the_backend_as_it_was(monkeypatch):
    monkeypatch.setenv("SGLANG_HQ_FORMAT", "bf16")
    backend = SimpleNamespace(captures_packed_variant=False)

    def stock(_runner, _size, _forward, _stream, label):
        if label:
            raise MemoryError

    with pytest.raises(MemoryError):
        graphs.capture_both_variants(stock, SimpleNamespace(attn_backend=backend), 4, None)
    assert not backend.captures_packed_variant


@pytest.mark.parametrize(
    "reads, label, wanted", [(False, None, None), (True, None, "packed"), (False, "lora", "lora"), (True, "lora", "packed lora")]
)
def test_the_batch_decides(reads, label, wanted):
    runner = SimpleNamespace(attn_backend=SimpleNamespace(reads_packed=reads))
    assert graphs.pick_variant(lambda *_: label, runner, None) == wanted


@pytest.mark.parametrize("stock, fits, wanted", [(True, True, True), (True, False, False), (False, True, False)])
def test_a_batch_beyond_the_plan_runs_eagerly(stock, fits, wanted):
    runner = SimpleNamespace(attn_backend=SimpleNamespace(fits_graph=lambda _batch: fits))
    assert graphs.runs_in_graph(lambda *_: stock, runner, None) == wanted
