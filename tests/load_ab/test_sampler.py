"""Peaks and time means of samples, and the thread that takes them."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from row_samples import metrics_samples

from sgl_hq.launch.kv_accounts import AccountsError
from sgl_hq.launch.load_ab import sampler as sampler_module
from sgl_hq.launch.load_ab.sampler import Moment, Sampler, Series, read_moment
from sgl_hq.launch.server_process import ServerFailed


def moments_of(times, used):
    return tuple(Moment(t, u, int(u), 0, 0, 0, 0) for t, u in zip(times, used))


def mean_of(times, used) -> float:
    return Series(moments_of(times, used), 1.0).used_mean().value


def test_what_a_moment_holds():
    samples = metrics_samples({"sglang:kv_available_tokens": 3096, "sglang:num_running_reqs": 3, "sglang:num_queue_reqs": 5})
    assert read_moment(samples, 100, 1.5) == Moment(1.5, 100_000, 1000, 0, 3, 5, 0)
    fp4 = read_moment(samples, 100 * 4.5 / 16, 1.5)
    assert (fp4.bytes_used, fp4.dense_tokens) == (28_125, 1000)
    packed = metrics_samples({"sglang:kv_available_tokens": 4000, "sglang:hq_packed_pages_used": 2, "sglang:hq_packed_bytes_used": 777})
    assert read_moment(packed, 100, 0.0)[1:4] == (96 * 100 + 777, 96, 128)
    assert read_moment(packed, 100, 0.0).resident_tokens == 224
    assert read_moment(metrics_samples({"sglang:hicache_host_total_tokens": 9000}), 100, 0.0).host_tokens == 9000


def test_a_server_without_its_gauges_is_refused():
    samples = [s for s in metrics_samples({}) if s.name != "sglang:num_running_reqs"]
    with pytest.raises(AccountsError, match="num_running_reqs"):
        read_moment(samples, 100, 0.0)


def test_peaks_means_and_shares():
    """Ten seconds at 100 bytes, then one second rising to 300: the mean follows time, not the number of samples."""
    series = Series(
        (Moment(0, 100, 1, 0, 1, 2, 0), Moment(10, 100, 1, 0, 7, 0, 50), Moment(11, 300, 1, 3, 2, 0, 50)), token_bytes=2.0
    )
    assert series.used_mean().value == pytest.approx((10 * 100 + 1 * 200) / 11)
    assert (series.used_peak().value, series.resident_peak().value, series.running_peak().value) == (300, 4, 7)
    assert series.packed_fraction_at_peak().value == 0.75
    assert series.host_bytes().value == 100.0
    assert series.packed_mean().value == pytest.approx(1.5 / 11) and series.resident_mean().value == pytest.approx((10 + 2.5) / 11)
    assert series.as_row() == {"t_s": [0, 10, 11], "kv_bytes_used": [100, 100, 300], "running": [1, 7, 2], "queued": [2, 0, 0]}
    with pytest.raises(AccountsError, match="No sample"):
        Series((), 1.0)


gaps = st.lists(st.floats(0.01, 100), min_size=1, max_size=20)


@given(gaps, st.data())
def test_a_time_mean_lies_between_the_extremes(gaps, data):
    times = [sum(gaps[:i]) for i in range(len(gaps) + 1)]
    used = data.draw(st.lists(st.integers(0, 10**12), min_size=len(times), max_size=len(times)))
    assert min(used) <= mean_of(times, used) <= max(used)


@given(st.floats(0, 50), gaps, st.integers(0, 10**12))
def test_a_constant_is_its_own_time_mean(start, gaps, level):
    times = [start + sum(gaps[:i]) for i in range(len(gaps) + 1)]
    assert mean_of(times, [level] * len(times)) == pytest.approx(level)


@given(gaps, st.floats(0.01, 0.99), st.data())
def test_sampling_more_often_does_not_move_a_time_mean(gaps, where, data):
    """A sample that says what its neighbours imply weighs nothing; in a mean over samples it would."""
    times = [sum(gaps[:i]) for i in range(len(gaps) + 1)]
    used = data.draw(st.lists(st.integers(0, 10**9), min_size=len(times), max_size=len(times)))
    at = data.draw(st.integers(1, len(gaps)))
    t = times[at - 1] + where * (times[at] - times[at - 1])
    between = used[at - 1] + where * (used[at] - used[at - 1])
    denser = mean_of([*times[:at], t, *times[at:]], [*used[:at], between, *used[at:]])
    assert denser == pytest.approx(mean_of(times, used), rel=1e-6, abs=1e-3)


@given(gaps, st.floats(0.1, 10), st.data())
def test_a_time_mean_scales_with_values_and_not_with_the_clock(gaps, factor, data):
    times = [sum(gaps[:i]) for i in range(len(gaps) + 1)]
    used = data.draw(st.lists(st.integers(0, 10**9), min_size=len(times), max_size=len(times)))
    mean = mean_of(times, used)
    assert mean_of([t * factor for t in times], used) == pytest.approx(mean, abs=1e-6)
    assert mean_of(times, [u * factor for u in used]) == pytest.approx(mean * factor, abs=1e-6)


class ScriptedServer:
    """Free slots go down by 64 with every answer; one answer, by its number, fails."""

    def __init__(self, fails_at: int | None = None):
        self.answers, self.fails_at = 0, fails_at

    def metrics(self):
        self.answers += 1
        if self.answers == self.fails_at:
            raise ServerFailed("no answer to /metrics")
        return metrics_samples({"sglang:kv_available_tokens": 4096 - 64 * self.answers})


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(sampler_module, "SAMPLE_EVERY_S", 0.01)


def test_samples_from_start_to_end(often):
    server = ScriptedServer()
    with Sampler(server, 10) as sampler:
        while server.answers < 5:
            time.sleep(0.01)
    series = sampler.series
    assert len(series.moments) == server.answers >= 6
    assert series.moments[0].bytes_used == 640 and series.used_peak().value == 640 * server.answers, "first and last moment count"
    times = [m.t_s for m in series.moments]
    assert times == sorted(times) and times[0] < 1


def test_a_phase_without_time_has_two_samples():
    with Sampler(ScriptedServer(), 10) as sampler:
        pass
    assert [m.dense_tokens for m in sampler.series.moments] == [64, 128]


def test_a_series_cut_short_is_an_error(often):
    with pytest.raises(ServerFailed, match="no answer to /metrics"):
        with Sampler(ScriptedServer(fails_at=3), 10):
            time.sleep(0.3)


def test_the_phases_own_failure_is_the_one_reported(often):
    with pytest.raises(ValueError, match="the load failed"):
        with Sampler(ScriptedServer(fails_at=3), 10):
            time.sleep(0.1)
            raise ValueError("the load failed")
