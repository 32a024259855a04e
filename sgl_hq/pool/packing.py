"""Packing that has begun: the device has been told, and whether the format can hold the values is known later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from sgl_hq.kernels.page_codec import UnpackablePageError


class Packing(NamedTuple):
    """pages: packed page ids in order, taken from the free list, garbage until the device is done. error: waits for that, and says
    why the pages are garbage for good, or None."""

    pages: list[int]
    error: Callable[[], UnpackablePageError | None]


def ids_on(device: torch.device | str, ids: Sequence[int]) -> torch.Tensor:
    """[len(ids)] int64. To a GPU from pinned memory: a copy from pageable memory waits for all that was launched on the stream before."""
    host = torch.tensor(ids, dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else host


def unpackable_on(status: torch.Tensor, read: torch.Tensor, format_name: str) -> Callable[[], UnpackablePageError | None]:
    """`Packing.error` of a kernel just launched on the current stream.

    status: [pages] int32 on its GPU, 0 for a page that could be packed. read: what the kernel reads, of another stream's allocator:
    held until the answer is dropped.
    """
    bad = torch.empty(1, dtype=torch.int64, pin_memory=True)
    bad.copy_(status.count_nonzero().reshape(1), non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    return partial(_error_once, done, bad, format_name, read)


def _error_once(done: torch.cuda.Event, bad: torch.Tensor, format_name: str, _read: torch.Tensor) -> UnpackablePageError | None:
    done.synchronize()
    return UnpackablePageError(f"format {format_name} cannot hold the values of {int(bad)} pages") if int(bad) else None
