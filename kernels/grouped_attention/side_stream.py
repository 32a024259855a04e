"""A second stream for the packed part of a layer: it depends on nothing of the dense part, so both fill the GPU together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch


class SideStream:
    """Works under CUDA graph capture too: the graph gets two branches."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = device

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)

    @contextmanager
    def fork(self) -> Iterator[None]:
        """What is launched inside runs after what the current stream has so far, beside what follows there."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """The current stream goes on when the side stream is done. Tensors of `fork` may be used and freed from here on."""
        torch.cuda.current_stream().wait_stream(self._stream)
