"""Two clocks for one decode step and the attention calls inside it.

CPU: the calling thread's wall clock, since every operator has ended when its call returns.
GPU: CUDA events. Python launches small kernels more slowly than a GPU runs them, and a server hides that with a CUDA
graph; so the GPU is held busy until the whole step has been launched, and then runs it without gaps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from sgl_hq.lab.errors import LabError

_FIRST_HOLD_CYCLES = 200_000_000  # about 0.1 s
_MOST_HOLD_CYCLES = 6_400_000_000  # about 4 s


class StepClock(Protocol):
    def attention(self) -> Iterator[None]:
        """Context manager around one attention call."""
        ...

    def time(self, step: Callable[[], object]) -> tuple[float, float]:
        """Run one step. (its seconds, seconds of them inside attention)"""
        ...


def clock_of(device: torch.device) -> StepClock:
    return CudaClock() if device.type == "cuda" else HostClock()


class HostClock:
    def __init__(self) -> None:
        self._inside = 0.0

    @contextmanager
    def attention(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._inside += time.perf_counter() - began

    def time(self, step: Callable[[], object]) -> tuple[float, float]:
        self._inside = 0.0
        began = time.perf_counter()
        step()
        return time.perf_counter() - began, self._inside


class CudaClock:
    def __init__(self) -> None:
        self._hold_cycles = _FIRST_HOLD_CYCLES
        self._inside: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def attention(self) -> Iterator[None]:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        yield
        ended.record()
        self._inside.append((began, ended))

    def time(self, step: Callable[[], object]) -> tuple[float, float]:
        """Raises LabError where a forward pass waits for the GPU, so that it cannot be launched ahead."""
        while self._hold_cycles <= _MOST_HOLD_CYCLES:
            self._inside.clear()
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(self._hold_cycles)
            began.record()
            step()
            ended.record()
            launched_ahead = not began.query()  # the GPU is still held: no kernel has had to wait for Python
            torch.cuda.synchronize()
            if launched_ahead:
                inside = sum(first.elapsed_time(last) for first, last in self._inside)
                return began.elapsed_time(ended) / 1e3, inside / 1e3
            self._hold_cycles *= 2
        raise LabError(
            "this model's forward pass waits for the GPU, so its kernels cannot be timed without gaps: "
            "take the share of attention from a profile and give it as --p-attn"
        )
