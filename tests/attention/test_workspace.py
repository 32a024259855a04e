"""What the KV byte budget is charged for plans is what the attention backend then holds."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from sgl_hq.pool.sizing import KVShape, TierSizes


@pytest.mark.parametrize("name, graph_rows", [("bf16", 8), ("hq6", 8), ("hq6", 0)])
def test_charged_bytes_are_held_bytes(name, graph_rows):
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

    from sgl_hq.attention.hq_attn_backend import HQGPUAttnBackendMixin, plan_bytes
    from sgl_hq.layer_codecs import layer_codecs
    from sgl_hq.pool.packed_tier import PackedTier

    class Stock(AttentionBackend):
        def init_cuda_graph_state(self, max_bs, max_num_tokens):
            pass

    class Backend(HQGPUAttnBackendMixin, Stock):
        def __init__(self):
            self.req_to_token_pool = SimpleNamespace(req_to_token=torch.zeros(3, 640, dtype=torch.int32))

    shape, sizes = KVShape(2, 2, 64, 64), TierSizes(640, 40, 5)
    backend = Backend()
    backend.token_to_kv_pool = SimpleNamespace(packed=PackedTier(layer_codecs(name, 2, 64, 64), shape, sizes, "cpu"))
    backend._prepare(6, 256)
    if graph_rows:
        backend.init_cuda_graph_state(graph_rows, graph_rows)
    charged = plan_bytes(backend.token_to_kv_pool.packed.codecs[0].layout, shape, sizes, "cpu", 6, graph_rows, 256, 640)
    assert charged == backend.workspace_bytes > 0
    assert not backend.reads_packed and backend.packed_tokens_read == 0


@pytest.mark.parametrize("graph", [True, False])
def test_only_graphs_fork_and_the_packed_part_comes_first(graph):
    from sgl_hq.attention.hq_attn_backend import HQGPUAttnBackendMixin

    seen = []

    def call(name, result=None):
        return lambda *_: (seen.append(name), result)[1]

    @contextmanager
    def fork():
        seen.append("fork")
        yield
        seen.append("packed part launched")

    q = torch.zeros(3, 2 * 8)
    layer = SimpleNamespace(tp_q_head_num=2, qk_head_dim=8, v_head_dim=8, attend_packed=call("attend"), join_packed=call("merge", q))
    backend = HQGPUAttnBackendMixin()
    backend._plan, backend.token_to_kv_pool = SimpleNamespace(graph=graph), None
    backend._side_stream = SimpleNamespace(fork=fork, join=call("join"))
    dense = call("dense")
    assert backend._forward(None, dense, q, q, q, layer, SimpleNamespace(), True) is q
    assert seen == (["fork", "attend", "packed part launched", "dense", "join", "merge"] if graph else ["attend", "dense", "merge"])
