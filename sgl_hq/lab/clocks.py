"""Two clocks for one decode step and the attention calls inside it.

CPU: the calling thread's wall clock, since every operator has ended when its call returns.
GPU: CUDA events. Python launches small kernels more slowly than a GPU runs them, and a server hides that with a CUDA
graph; so the GPU is held busy before each piece of the step (an attention call, or what lies between two) until the
piece has been launched, and then runs it without gaps. Piece by piece, since only about 1,024 launches can wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from sgl_hq.lab.errors import LabError

_FIRST_HOLD_CYCLES = 2_000_000  # about 1 ms
_MOST_HOLD_CYCLES = 128_000_000  # about 70 ms


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
        self._pieces: list[_Piece] = []

    @contextmanager
    def attention(self) -> Iterator[None]:
        self._pieces[-1].end()
        self._pieces.append(_Piece(self._hold_cycles, inside=True))
        yield
        self._pieces[-1].end()
        self._pieces.append(_Piece(self._hold_cycles, inside=False))

    def time(self, step: Callable[[], object]) -> tuple[float, float]:
        """Raises LabError where a forward pass waits for the GPU, so that it cannot be launched ahead."""
        while self._hold_cycles <= _MOST_HOLD_CYCLES:
            torch.cuda.synchronize()
            self._pieces = [_Piece(self._hold_cycles, inside=False)]
            step()
            self._pieces[-1].end()
            torch.cuda.synchronize()
            if all(piece.launched_ahead for piece in self._pieces):
                return sum(p.seconds() for p in self._pieces), sum(p.seconds() for p in self._pieces if p.inside)
            self._hold_cycles *= 2
        raise LabError(
            "this model's forward pass waits for the GPU, so its kernels cannot be timed without gaps: "
            "take the share of attention from a profile and give it as --p-attn"
        )


class _Piece:
    """A run of kernels behind a hold. inside: of an attention call."""

    def __init__(self, hold_cycles: int, inside: bool) -> None:
        self.inside = inside
        self._began, self._ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(hold_cycles)
        self._began.record()

    def end(self) -> None:
        self._ended.record()
        self.launched_ahead = not self._began.query()  # the hold still lasts: no kernel has had to wait for Python

    def seconds(self) -> float:
        return self._began.elapsed_time(self._ended) / 1e3
