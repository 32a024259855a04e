"""Decode of the GPU backend mixin on CPU tensors, in a process where Triton interprets: real pool, real layer, our kernels."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from test_layer_and_backend import BF16_TOLERANCE_PER_V, DIM, KV_HEADS, LAYERS, Q_HEADS, Harness

from sgl_hq.attention.hq_attn_backend import HQGPUAttnBackendMixin
from sgl_hq.kernels.grouped_attention.naive import attend_naive
from sgl_hq.page_format import PAGE_TOKENS

MAX_BATCH = 6


class NoStockBackend(AttentionBackend):
    """A decode batch with packed pages asks the stock class for nothing but room for graphs."""

    def init_cuda_graph_state(self, max_bs, max_num_tokens):
        pass


class Backend(HQGPUAttnBackendMixin, NoStockBackend):
    def __init__(self, harness: Harness) -> None:
        self.token_to_kv_pool, self.req_to_token_pool = harness.pool, harness.rows
        self._prepare(Q_HEADS, 64)
        self._side_stream = SimpleNamespace(fork=nullcontext, join=lambda: None)
        self.init_cuda_graph_state(MAX_BATCH, MAX_BATCH)
        self.forward_runs = lambda: ([1, 2, 3], harness.runs)


def check_decode(fmt: str, lens: list[int], graph: bool) -> None:
    """Three steps of three requests, two of which share packed pages; the new tokens are written by the step, behind them is NaN."""
    with pytest.MonkeyPatch.context() as patch:
        harness = Harness(patch, fmt, lens, 2)
        backend = Backend(harness)
        for step in (2, 1, 0):
            for layer in range(LAYERS):
                _check_step(harness, backend, [n - step for n in lens], layer, graph)


def _check_step(harness: Harness, backend: Backend, lens: list[int], layer: int, graph: bool) -> None:
    lanes = MAX_BATCH if graph else len(lens)
    padding = [0] * (lanes - len(lens))
    slots = [int(harness.rows.req_to_token[row + 1, n - 1]) for row, n in enumerate(lens)]
    new = [torch.stack([harness.truth[layer][row][side][:, n - 1] for row, n in enumerate(lens)]) for side in (0, 1)]
    q, k, v = (torch.full((lanes, heads, DIM), torch.nan, dtype=torch.bfloat16) for heads in (Q_HEADS, KV_HEADS, KV_HEADS))
    q[: len(lens)], k[: len(lens)], v[: len(lens)] = torch.randn(len(lens), Q_HEADS, DIM), *new
    for buffer in harness.pool.get_kv_buffer(layer):  # nothing behind the last token is read, and it is written by the step
        for slot in slots:
            buffer[slot : (slot // PAGE_TOKENS + 1) * PAGE_TOKENS] = torch.nan
    batch = SimpleNamespace(
        forward_mode=SimpleNamespace(is_decode=lambda: True, is_idle=lambda: False), batch_size=lanes, num_padding=len(padding),
        req_pool_indices=torch.tensor([1, 2, 3, *padding]), seq_lens=torch.tensor([*lens, *[1 for _ in padding]]),
        out_cache_loc=torch.tensor([*slots, *padding]),
    )  # fmt: skip
    backend.init_forward_metadata_out_graph(batch) if graph else backend.init_forward_metadata(batch)
    assert backend.reads_packed and backend._plan.graph == graph
    got = backend.forward_decode(q.flatten(1), k, v, harness.layers[layer], batch).view(lanes, Q_HEADS, DIM)
    assert not got[len(lens) :].any(), "padding is not empty"
    for row, n in enumerate(lens):
        true_k, true_v = (side[:, :n] for side in harness.truth[layer][row])
        want = attend_naive(q[row : row + 1], true_k, true_v, DIM**-0.5).o[0]
        assert (got[row].double() - want).abs().max() < BF16_TOLERANCE_PER_V * true_v.abs().max()
