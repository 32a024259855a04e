"""The share of attention in a decode step: real steps, honest clocks, refusals."""

from __future__ import annotations

import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from sgl_hq.gate.run import load_model
from sgl_hq.hq_cache import HQCache
from sgl_hq.lab import clocks
from sgl_hq.lab.attention_share import WARM_UP_STEPS, measure_share
from sgl_hq.lab.clocks import CudaClock, HostClock
from sgl_hq.lab.errors import LabError
from sgl_hq.lab.slot_cache import SlotCache

IDS = torch.randint(0, 256, (2049,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="session")
def model(tiny_model):
    """In bfloat16, as it is served."""
    return load_model(str(tiny_model)).model.to(torch.bfloat16)


@torch.inference_mode()
def test_a_slot_cache_decodes_like_a_growing_one_again_and_again(model):
    tokens = torch.tensor([IDS[:200]])
    prefix = HQCache("bf16")
    model(input_ids=tokens[:, :-1], past_key_values=prefix)
    slots = SlotCache(prefix, 3)
    expected = model(input_ids=tokens[:, -1:], past_key_values=prefix).logits[0]
    for _ in range(2):  # a step leaves nothing behind
        found = model(input_ids=tokens[:, -1:].expand(3, 1), past_key_values=slots).logits
        torch.testing.assert_close(found, expected.expand(3, 1, -1), rtol=0, atol=0.1)  # bfloat16: logits of 8 are rounded to 1/16
        assert slots.get_seq_length() == 199
    assert slots.layers[0].keys.shape == (3, 2, 200, 16)
    assert len({row.data_ptr() for row in slots.layers[0].keys}) == 3  # every row has its own bytes to read


def test_shares_of_real_steps_grow_with_context_and_batch(model):
    advanced = []
    long = measure_share(model, IDS, 8, 5, lambda: advanced.append(1))
    short = measure_share(model, IDS[:65], 1, 5)
    assert 0 < short.p_attn < long.p_attn < 1
    assert (len(long.step_s), len(advanced)) == (5, 1 + WARM_UP_STEPS + 5)
    assert long.kv_bytes == 8 * 2 * 2 * 2048 * 2 * 16 * 2  # rows, layers, K and V, tokens, heads, channels, bytes
    assert (long.context_tokens, long.batch) == (2048, 8)
    assert long.read_gb_per_s == pytest.approx(long.kv_bytes / sorted(long.attention_s)[2] / 1e9)
    assert model.config._attn_implementation == "sdpa"


def test_the_clock_sees_what_torch_profiler_sees(model):
    """Another clock over the same calls: the operator by its name instead of a function around it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        share = measure_share(model, IDS, 8, 9)
    calls = [event.cpu_time_total / 1e6 for event in profiled.events() if event.name == "aten::scaled_dot_product_attention"]
    seen = sum(calls[-9 * 2 :])  # two layers; prefill and warm-up came first
    assert len(calls) == 2 * (1 + WARM_UP_STEPS + 9)
    assert 0.5 * sum(share.attention_s) < seen < 1.02 * sum(share.attention_s)  # the function does little beside the operator


def test_attention_that_cannot_be_watched_is_refused(model, monkeypatch):
    monkeypatch.setattr("sgl_hq.lab.attention_share.attention_through", lambda *_: nullcontext())
    with pytest.raises(LabError, match="cannot be timed: give --p-attn"):
        measure_share(model, IDS[:65], 1, 1)


def test_a_cache_that_does_not_fit_is_refused_before_it_is_allocated(model, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(LabError, match="smaller --batch or --context"):
        measure_share(model, IDS[:65], 4, 1)


def test_the_host_clock_counts_attention_inside_the_step():
    clock = HostClock()

    def step():
        time.sleep(0.02)
        for _ in range(2):
            with clock.attention():
                time.sleep(0.01)

    for _ in range(2):  # the second step does not count the first one's attention
        whole, inside = clock.time(step)
        assert 0.02 <= inside <= whole - 0.02 and inside < 0.2


class FakeGpu:
    """A device with a clock of its own, in ms, that a hold does not advance. Python needs `launch_cycles` for a piece."""

    def __init__(self, launch_cycles: int) -> None:
        self.launch_cycles, self.held, self.now_ms = launch_cycles, [], 0.0

    def install(self, monkeypatch) -> FakeGpu:
        cuda = SimpleNamespace(Event=lambda enable_timing: FakeEvent(self), synchronize=lambda: None, _sleep=self.held.append)
        monkeypatch.setattr(clocks, "torch", SimpleNamespace(cuda=cuda))
        return self


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.at_ms = self.gpu.now_ms

    def query(self) -> bool:
        """Passed already, since the hold ended before the piece was launched."""
        return self.gpu.held[-1] < self.gpu.launch_cycles

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at_ms - self.at_ms


def test_the_cuda_clock_holds_the_gpu_until_each_piece_is_launched(monkeypatch):
    gpu, clock = FakeGpu(3 * clocks._FIRST_HOLD_CYCLES).install(monkeypatch), CudaClock()

    def step():
        gpu.now_ms += 1
        for _ in range(2):  # layers
            with clock.attention():
                gpu.now_ms += 10
            gpu.now_ms += 100

    assert clock.time(step) == pytest.approx((0.221, 0.020))
    assert gpu.held == [clocks._FIRST_HOLD_CYCLES * n for n in (1, 2, 4) for _ in range(5)]
    assert clock.time(step) == pytest.approx((0.221, 0.020))
    assert gpu.held[15:] == gpu.held[10:15]  # what was enough once is tried first


def test_the_cuda_clock_tries_again_when_one_piece_came_late(monkeypatch):
    gpu, clock, calls = FakeGpu(0).install(monkeypatch), CudaClock(), []

    def step():
        calls.append(1)
        with clock.attention():
            gpu.launch_cycles = clocks._FIRST_HOLD_CYCLES + 1
        gpu.launch_cycles = 0

    clock.time(step)
    assert len(calls) == 2


def test_the_cuda_clock_refuses_a_step_that_waits_for_the_gpu(monkeypatch):
    FakeGpu(10 * clocks._MOST_HOLD_CYCLES).install(monkeypatch)
    with pytest.raises(LabError, match="give it as --p-attn"):
        CudaClock().time(lambda: None)
