"""A prefill as the stock backend must see it for its dense rest: shorter sequences, rows that begin behind the packed run.

Softmax does not care where a token stands, positions are rotated in already, and a packed run is whole pages, so the
stock metadata code builds correct indices from shifted rows. Nothing is copied: `req_to_token` [rows, row_tokens] seen
as one column has a row stride of 1, and request i begins at entry `row * row_tokens + packed tokens`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import contextmanager

import torch

from sgl_hq.records import PackedRun


class DenseView:
    """Makes shifted views of batches; keeps the shifts of the last batch on the device, since decode steps repeat them.

    row_tokens: tokens per row of `req_to_token`.
    """

    def __init__(self, row_tokens: int, device):
        self._row_tokens, self._device = row_tokens, device
        self._host: torch.Tensor | None = None  # [rows] int64, packed tokens of each request, 0 for padding
        self._shift: torch.Tensor | None = None  # the same on the device

    def of(self, forward_batch, runs: Sequence[PackedRun]):
        """A shallow copy of `forward_batch` (SGLang's ForwardBatch) with dense lengths and rows; runs[i] belongs to request i."""
        shift = self.starts(runs, forward_batch.batch_size)
        view = copy.copy(forward_batch)
        view.req_pool_indices = forward_batch.req_pool_indices.to(torch.int64) * self._row_tokens + shift
        view.seq_lens = forward_batch.seq_lens - shift
        if forward_batch.seq_lens_cpu is not None:
            view.seq_lens_cpu = forward_batch.seq_lens_cpu - self._host
        if forward_batch.seq_lens_sum is not None:
            view.seq_lens_sum = forward_batch.seq_lens_sum - int(self._host.sum())
        prefixes = forward_batch.extend_prefix_lens
        view.extend_prefix_lens = prefixes - shift.to(prefixes.dtype)
        view.extend_prefix_lens_cpu = [n - run.tokens for n, run in zip(forward_batch.extend_prefix_lens_cpu, runs, strict=True)]
        return view

    def starts(self, runs: Sequence[PackedRun], rows: int) -> torch.Tensor:
        """First dense token of each row, [rows] int64 on the device; rows behind the last run are graph padding, 0."""
        self._set([run.tokens for run in runs], rows)
        return self._shift

    def _set(self, packed_tokens: list[int], rows: int) -> None:
        packed_tokens = packed_tokens + [0] * (rows - len(packed_tokens))
        if self._host is not None and self._host.tolist() == packed_tokens:
            return
        # Fresh pinned memory: the copy of an earlier step may still be under way, and the allocator waits for it.
        self._host = torch.tensor(packed_tokens, dtype=torch.int64, pin_memory=torch.device(self._device).type == "cuda")
        self._shift = self._host.to(self._device, non_blocking=True)


@contextmanager
def swapped(owner, name: str, value):
    """`owner.name` is `value` inside."""
    stock = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, stock)


def as_one_column(req_to_token: torch.Tensor) -> torch.Tensor:
    """`[rows, row_tokens]` as `[rows * row_tokens, 1]`, the table of a shifted view; no copy."""
    return req_to_token.view(-1, 1)
