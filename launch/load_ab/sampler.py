"""What is resident in a server's KV while a phase runs: samples of /metrics, and their peaks and means over time.

The same gauges for every arm (`kv_accounts.py` says which); arms differ only in the bytes of a dense token, which follow from
the KV type: bf16, half of it in fp8, 4.5 bits of 16 in fp4_mx_block16 (a byte of scale for 16 values).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np

from sgl_hq.launch.kv_accounts import AccountsError, gauge, read_peak
from sgl_hq.launch.load_ab.figures import Amount, Reading
from sgl_hq.launch.prometheus_text import Sample
from sgl_hq.launch.sampling_thread import SamplingThread
from sgl_hq.launch.server_process import ServerFailed

SAMPLE_EVERY_S = 0.25  # each sample costs the HTTP process some 10 ms of one of its cores
HOST_TOKENS = "sglang:hicache_host_total_tokens"


class Metered(Protocol):
    """Anything with the samples of a `GET /metrics`, such as ServerProcess."""

    def metrics(self) -> list[Sample]: ...


class Moment(NamedTuple):
    """One /metrics answer. t_s: seconds since the phase began; bytes are on the device, host_tokens is a capacity."""

    t_s: float
    bytes_used: float
    dense_tokens: int
    packed_tokens: int
    running: int
    queued: int
    host_tokens: int

    @property
    def resident_tokens(self) -> int:
        return self.dense_tokens + self.packed_tokens


def read_moment(samples: Sequence[Sample], token_bytes: float, t_s: float) -> Moment:
    """token_bytes: of a dense token in this arm's KV type. Raises AccountsError where a gauge is missing."""
    resident = read_peak(samples, token_bytes)
    host = [s.value for s in samples if s.name == HOST_TOKENS]  # only with --enable-hierarchical-cache
    return Moment(
        t_s, *resident,
        running=int(gauge(samples, "sglang:num_running_reqs")),
        queued=int(gauge(samples, "sglang:num_queue_reqs")),
        host_tokens=int(max(host, default=0)),
    )  # fmt: skip


@dataclass(frozen=True)
class Series:
    """The samples of one phase, in time. token_bytes: of a dense token in this arm's KV type."""

    moments: tuple[Moment, ...]
    token_bytes: float

    def __post_init__(self) -> None:
        if not self.moments:
            raise AccountsError("No sample of /metrics was taken in this phase: start the server with --enable-metrics")

    def used_peak(self) -> Amount:
        return Amount(max(m.bytes_used for m in self.moments), (Reading.USED,))

    def used_mean(self) -> Amount:
        return Amount(self._mean([m.bytes_used for m in self.moments]), (Reading.USED,))

    def resident_peak(self) -> Amount:
        return Amount(max(m.resident_tokens for m in self.moments), (Reading.RESIDENT,))

    def resident_mean(self) -> Amount:
        return Amount(self._mean([m.resident_tokens for m in self.moments]), (Reading.RESIDENT,))

    def packed_mean(self) -> Amount:
        return Amount(self._mean([m.packed_tokens for m in self.moments]), (Reading.PACKED,))

    def packed_fraction_at_peak(self) -> Amount:
        """Of the sample with the most bytes, the first of equals."""
        peak = max(self.moments, key=lambda m: m.bytes_used)
        return Amount(peak.packed_tokens, (Reading.PACKED,)).per(Amount(peak.resident_tokens, (Reading.RESIDENT,)))

    def running_peak(self) -> Amount:
        return Amount(max(m.running for m in self.moments), (Reading.RUNNING,))

    def host_bytes(self) -> Amount:
        return Amount(max(m.host_tokens for m in self.moments) * self.token_bytes, (Reading.HOST,))

    def as_row(self) -> dict[str, list[Any]]:
        """The `series` of a run row: seconds, bytes and requests, one entry a sample."""
        return {
            "t_s": [round(m.t_s, 3) for m in self.moments],
            "kv_bytes_used": [round(m.bytes_used) for m in self.moments],
            "running": [m.running for m in self.moments],
            "queued": [m.queued for m in self.moments],
        }

    def _mean(self, values: Sequence[float]) -> float:
        """Over time: samples are further apart when the server is busy, so each counts for the gaps beside it."""
        times = [m.t_s for m in self.moments]
        if times[-1] == times[0]:
            return float(np.mean(values))
        # Rounding may carry the quotient past the extremes that it lies between.
        return float(np.clip(np.trapezoid(values, times) / (times[-1] - times[0]), min(values), max(values)))


class Sampler(SamplingThread):
    """Samples a server in the background: at the start, every SAMPLE_EVERY_S and at the end of a `with` block."""

    def __init__(self, server: Metered, token_bytes: float):
        super().__init__(SAMPLE_EVERY_S, (ServerFailed, AccountsError))
        self._server, self._token_bytes = server, token_bytes
        self._moments: list[Moment] = []

    def __enter__(self) -> Sampler:
        self._began = time.monotonic()
        self.take()
        return super().__enter__()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, value, trace)
        if kind is not None:
            return  # the phase itself failed and says why
        if self.failure is not None:
            raise self.failure  # half a series would hide the peaks after it
        self.take()

    @property
    def series(self) -> Series:
        return Series(tuple(self._moments), self._token_bytes)

    def take(self) -> None:
        samples = self._server.metrics()
        self._moments.append(read_moment(samples, self._token_bytes, time.monotonic() - self._began))
