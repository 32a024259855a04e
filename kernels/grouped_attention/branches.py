"""Streams for the kernels of a layer that depend on nothing of each other, so that they fill the GPU together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Branches:
    """Works under CUDA graph capture: a fork becomes a branch of the graph. Streams are made once, by name."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = device
        self._streams: dict[str, torch.cuda.Stream] = {}
        self._forked: list[torch.cuda.Stream] = []

    @contextmanager
    def fork(self, name: str, first: bool = False) -> Iterator[None]:
        """What is launched inside runs after what the current stream has so far, beside what follows there.

        first: where several kernels are ready, the GPU begins with this one.
        """
        if name not in self._streams:
            self._streams[name] = torch.cuda.Stream(self._device, priority=-1 if first else 0)
        stream = self._streams[name]
        stream.wait_stream(torch.cuda.current_stream())
        self._forked.append(stream)
        with torch.cuda.stream(stream):
            yield

    def join(self) -> None:
        """The current stream goes on when all branches are done. Tensors that they use may be used and freed from here on."""
        for stream in self._forked:
            torch.cuda.current_stream().wait_stream(stream)
        self._forked.clear()
