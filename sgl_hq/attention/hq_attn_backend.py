"""What belongs to the batch: the plan, the dense part behind the packed run, and the merge.

Mixed into the attention backend the user chose (its class is swapped in place, so every attribute SGLang reads from
the backend stays the stock one). A batch with nothing packed takes the stock path untouched; mode `exact` always does.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sgl_hq.attention.dense_view import DenseView
from sgl_hq.attention.device_plan import DevicePlan
from sgl_hq.attention.hq_radix_attention import DenseState
from sgl_hq.attention.merge import merge
from sgl_hq.attention.plan import PackedPlan, make_plan
from sgl_hq.config import HQConfigError
from sgl_hq.kernels.grouped_attention.side_stream import SideStream
from sgl_hq.metrics.bins import NO_GROUPS
from sgl_hq.page_format import PageLayout
from sgl_hq.pool.sizing import KVShape, TierSizes
from sgl_hq.records import EMPTY_RUN, PackedRun, Segment

_USUAL_RUN_PAGES = 128  # 8,192 tokens

# Stock classes that can give the dense part of a prefill as a state on a GPU, and the adapter of each.
_GPU_ADAPTERS = {
    "FlashInferAttnBackend": "sgl_hq.attention.dense_flashinfer:FlashInferDense",
    "FlashAttentionBackend": "sgl_hq.attention.dense_fa3:FA3Dense",
    "TritonAttnBackend": "sgl_hq.attention.dense_triton:TritonDense",
}


class HQAttnBackendMixin(AttentionBackend):
    """All of mode `exact`. Derives from SGLang's base so that CPython sees one instance layout and lets `install` swap the class."""

    forward_runs: Callable[[], tuple[list[int], list[PackedRun]]] | None = None  # of the batch about to run; set with the radix cache
    packed_tokens_read = 0  # totals over forwards, once per group
    packed_tokens_attended = 0  # the same, once per request of the group
    group_requests = NO_GROUPS  # groups of all forwards by the number of their requests
    captures_packed_variant = False  # while decode graphs are captured: this one is for batches with packed pages
    _plan = None

    @property
    def reads_packed(self) -> bool:
        """The batch whose metadata were prepared last reads packed pages."""
        return self._plan is not None

    @property
    def workspace_bytes(self) -> int:
        """Device bytes held for plans and partial results."""
        return 0

    def fits_graph(self, forward_batch) -> bool:
        """A decode graph's plan has room for the batch."""
        return True

    def _begin(self, plan) -> None:
        self._plan = plan
        if plan is not None:
            self.packed_tokens_read += plan.tokens_read
            self.packed_tokens_attended += plan.tokens_attended
            self.group_requests += plan.group_requests


class HQCPUAttnBackendMixin(HQAttnBackendMixin):
    """Needs of the stock class, beyond SGLang's interface: `write_kv`, `extend_state`, `decode_state`
    (see `platform_cpu/attention.py`), each taking `dense_starts`."""

    def init_forward_metadata(self, forward_batch):
        super().init_forward_metadata(forward_batch)
        self._begin(self._plan_of(forward_batch))

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        if self._plan is None:
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if save_kv_cache:
            self.write_kv(k, v, layer, forward_batch)
        q = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        dense = self.extend_state(q, k, v, layer, forward_batch, self._plan.dense_starts)
        return self._merge_with_packed(q, dense, layer)

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        if self._plan is None:
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if save_kv_cache:
            self.write_kv(k, v, layer, forward_batch)
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        dense = self.decode_state(q, layer, forward_batch, self._plan.dense_starts)
        return self._merge_with_packed(q, dense, layer)

    def _merge_with_packed(self, q, dense, layer) -> torch.Tensor:
        state = merge(layer.packed_state(q, self._plan, self.token_to_kv_pool), dense)
        return state.o.to(q.dtype).flatten(1)

    def _plan_of(self, forward_batch) -> PackedPlan | None:
        if forward_batch.forward_mode.is_idle():
            return None
        rows, runs = self.forward_runs()
        if rows != forward_batch.req_pool_indices.tolist():
            # Reading on would take freed slots for a packed prefix.
            raise RuntimeError(
                f"sgl_hq: the batch has rows {forward_batch.req_pool_indices.tolist()}, packed runs were taken for {rows}"
            )
        decode = forward_batch.forward_mode.is_decode()
        return make_plan(runs, [1] * len(runs) if decode else list(forward_batch.extend_seq_lens_cpu), self.device)


class HQGPUAttnBackendMixin(HQAttnBackendMixin):
    """Needs of the stock class, from its adapter (`dense_*.py`): `lse_base2`, `dense_tables`, `dense_extend`, for prefills.

    A decode batch with packed pages runs our kernels alone, over dense pages too, and prepares no stock metadata. Decode graphs
    are captured twice per batch size (`patches/graphs.py`).
    """

    def init_cuda_graph_state(self, max_bs, max_num_tokens, *args, **kwargs):
        super().init_cuda_graph_state(max_bs, max_num_tokens, *args, **kwargs)
        scratch, row_tokens = self._eager_plan.work.scratch, self.req_to_token_pool.req_to_token.shape[1]
        self._graph_plan = DevicePlan(self.token_to_kv_pool.packed, self._q_heads, max_bs, row_tokens, graph=True, scratch=scratch)

    def init_forward_metadata(self, forward_batch):
        """Eager forwards, and prefill under breakable graphs, where attention runs between the graphs."""
        runs = self._packed_runs(forward_batch)
        if runs is None:
            self._begin(None)
            return super().init_forward_metadata(forward_batch)
        decode = forward_batch.forward_mode.is_decode()
        self._eager_plan.set(runs, [1] * len(runs) if decode else list(forward_batch.extend_seq_lens_cpu))
        self._begin(self._eager_plan)
        if decode:
            self._list_dense_pages(forward_batch, runs)
            return
        view = self._dense_view.of(forward_batch, runs)
        with self.dense_tables(view):
            super().init_forward_metadata(view)

    def init_forward_metadata_out_graph(self, forward_batch, in_capture=False):
        """Decode graphs: before capture and before each replay."""
        if self.captures_packed_variant:
            runs = [EMPTY_RUN] * forward_batch.batch_size
        else:
            runs = None if in_capture else self._packed_runs(forward_batch)
        if runs is None:
            self._begin(None)
            return super().init_forward_metadata_out_graph(forward_batch, in_capture)
        self._graph_plan.set(runs, [1] * len(runs))
        self._begin(self._graph_plan)
        self._list_dense_pages(forward_batch, runs)

    def fits_graph(self, forward_batch) -> bool:
        runs = self._packed_runs(forward_batch)
        return runs is None or self._graph_plan.prepare(runs, [1] * len(runs))

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        return self._forward(super().forward_decode, self._decode_dense, q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        return self._forward(super().forward_extend, self._extend_dense, q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

    def _forward(self, stock, dense, q, k, v, layer, forward_batch, save_kv_cache, **kwargs) -> torch.Tensor:
        if self._plan is None:
            return stock(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if kwargs or k is None:
            raise NotImplementedError(f"sgl_hq: packed pages cannot be read by attention with {sorted(kwargs) or 'shared K and V'}")
        # Breakable graphs name the memory of the output. The dense state must not take it: the merge reads one, writes the other.
        out, forward_batch._attn_output = getattr(forward_batch, "_attn_output", None), None
        q = q.contiguous().view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        # Forking costs host time: nothing in a graph, but in an eager forward the GPU would wait for it.
        with self._side_stream.fork() if self._plan.graph else nullcontext():
            layer.attend_packed(q, self._plan, self.token_to_kv_pool)
        state = dense(q, k, v, layer, forward_batch, save_kv_cache)
        if self._plan.graph:
            self._side_stream.join()
        return layer.join_packed(q, state, self._plan, self.token_to_kv_pool, out)

    def _decode_dense(self, q, k, v, layer, forward_batch, save_kv_cache: bool) -> None:
        """Parts over dense pages, into the plan's buffers."""
        if save_kv_cache:  # as the stock decodes do; the pool is bfloat16, so scales change nothing
            slots = KVWriteLoc(forward_batch.out_cache_loc)
            self.token_to_kv_pool.set_kv_buffer(layer, slots, k, v, layer.k_scale, layer.v_scale)
        layer.attend_dense(q, self._plan, self.token_to_kv_pool)

    def _extend_dense(self, q, k, v, layer, forward_batch, save_kv_cache: bool) -> DenseState:
        o, lse = self.dense_extend(q, k, v, layer, forward_batch, save_kv_cache)
        return DenseState(o.view(-1, layer.tp_q_head_num, layer.v_head_dim), lse, self.lse_base2)

    def _list_dense_pages(self, forward_batch, runs: Sequence[PackedRun]) -> None:
        """For a decode batch; rows behind the runs are graph padding."""
        starts = self._dense_view.starts(runs, forward_batch.batch_size)
        table = self.req_to_token_pool.req_to_token
        self._plan.list_dense_pages(table, forward_batch.req_pool_indices, starts, forward_batch.seq_lens, len(runs))

    def _packed_runs(self, forward_batch) -> Sequence[PackedRun] | None:
        """The packed runs of the batch without its padding; None if nothing is packed."""
        if self.forward_runs is None or forward_batch.forward_mode.is_idle():  # None: SGLang warms up before there is a tree
            return None
        rows, runs = self.forward_runs()
        if not any(run.tokens for run in runs):
            return None
        requests = forward_batch.batch_size - getattr(forward_batch, "num_padding", 0)
        if requests != len(rows):  # the rows themselves are on the device: comparing them would wait for it
            raise RuntimeError(f"sgl_hq: the batch has {requests} requests, packed runs were taken for rows {rows}")
        return runs

    @property
    def workspace_bytes(self) -> int:
        return sum(plan.nbytes for plan in (self._graph_plan, self._eager_plan) if plan is not None)

    def _prepare(self, q_heads: int, eager_rows: int) -> None:
        req_to_token = self.req_to_token_pool.req_to_token
        self._q_heads = q_heads
        self._graph_plan = None  # made when SGLang asks for graph buffers
        self._eager_plan = _eager_plan(self.token_to_kv_pool.packed, q_heads, eager_rows)
        self._side_stream = SideStream(req_to_token.device)
        self._dense_view = DenseView(req_to_token.shape[1], req_to_token.device)


def plan_bytes(
    layout: PageLayout, shape: KVShape, sizes: TierSizes, device, q_heads: int, graph_rows: int, eager_rows: int, row_tokens: int
) -> int:  # fmt: skip
    """`workspace_bytes` of a backend over such tiers, before there is one: its plans are made and dropped again.

    graph_rows: largest batch of the decode graphs, 0 without them. row_tokens: of the longest request.
    """
    codec, records = SimpleNamespace(layout=layout), torch.empty(0, device=device)
    tier = SimpleNamespace(codecs=[codec], records=[records], shape=shape, sizes=sizes, sink_slot=lambda page: -1)
    eager = _eager_plan(tier, q_heads, eager_rows)
    graph = DevicePlan(tier, q_heads, graph_rows, row_tokens, graph=True, scratch=eager.work.scratch).nbytes if graph_rows else 0
    needed = eager.nbytes + graph
    del eager
    torch.cuda.empty_cache()  # the pool that is built next takes its own memory
    return needed


def _eager_plan(tier, q_heads: int, rows: int) -> DevicePlan:
    """For eager forwards: grows on demand, and starts with room for `rows` tokens of a prefill behind one shared run."""
    plan = DevicePlan(tier, q_heads, rows, graph=False)
    plan.set([PackedRun((Segment(0, tuple(range(min(tier.sizes.packed_pages, _USUAL_RUN_PAGES)))),), 0)], [rows])
    plan.set([], [])
    return plan


def install(backend, packs: bool, q_heads: int = 0, eager_rows: int = 0) -> None:
    """Turn a stock attention backend instance into its HQ subclass, in place.

    q_heads, eager_rows (query tokens of one eager forward): for backends on a GPU, to size their plans.
    Raises HQConfigError if pages may be packed and the backend cannot give its dense part as a state.
    """
    stock = type(backend)
    if issubclass(stock, HQAttnBackendMixin):
        return
    if not packs:
        bases = (HQAttnBackendMixin, stock)
    elif stock.__name__ in _GPU_ADAPTERS:
        bases = (HQGPUAttnBackendMixin, pkgutil.resolve_name(_GPU_ADAPTERS[stock.__name__]), stock)
    elif all(hasattr(stock, name) for name in ("write_kv", "extend_state", "decode_state")):
        bases = (HQCPUAttnBackendMixin, stock)
    else:
        raise HQConfigError(
            f"attention backend {stock.__name__} cannot serve packed pages: use --attention-backend flashinfer, fa3 or triton on a "
            "GPU, SGLANG_PLATFORM=sgl_hq_cpu --device cpu without one, or --hq-format exact"
        )
    backend.__class__ = type("HQ" + stock.__name__, bases, {})
    if bases[0] is HQGPUAttnBackendMixin:
        backend._prepare(q_heads, eager_rows)
