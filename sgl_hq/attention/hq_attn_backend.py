"""What belongs to the batch: the plan, the dense call shifted past the packed run, and the merge.

Mixed into the attention backend the user chose (its class is swapped in place, so every attribute SGLang reads from
the backend stays the stock one). A batch with nothing packed takes the stock path untouched; mode `exact` always does.
"""

from __future__ import annotations

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from sgl_hq.attention.merge import merge
from sgl_hq.attention.plan import PackedPlan, make_plan
from sgl_hq.config import HQConfigError


class HQAttnBackendMixin(AttentionBackend):
    """Derives from SGLang's base so that CPython sees one instance layout and lets `install` swap the class.

    Needs of the stock class, beyond SGLang's interface: `write_kv`, `extend_state`, `decode_state`
    (see `platform_cpu/attention.py`), each taking `dense_starts`."""

    def init_forward_metadata(self, forward_batch):
        super().init_forward_metadata(forward_batch)
        self._plan = self._plan_of(forward_batch)
        if self._plan is not None:
            self.packed_tokens_read += self._plan.tokens_read
            self.packed_tokens_attended += self._plan.tokens_attended

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
        if self.token_to_kv_pool.packed is None or forward_batch.forward_mode.is_idle():
            return None
        rows, runs = self.forward_runs()
        if rows != forward_batch.req_pool_indices.tolist():
            # Reading on would take freed slots for a packed prefix.
            raise RuntimeError(
                f"sgl_hq: the batch has rows {forward_batch.req_pool_indices.tolist()}, packed runs were taken for {rows}"
            )
        decode = forward_batch.forward_mode.is_decode()
        return make_plan(runs, [1] * len(runs) if decode else list(forward_batch.extend_seq_lens_cpu), self.device)


def install(backend, packs: bool) -> None:
    """Turn a stock attention backend instance into its HQ subclass, in place.

    Raises HQConfigError if pages may be packed and the backend cannot give its dense part as a state.
    """
    stock = type(backend)
    if issubclass(stock, HQAttnBackendMixin):
        return
    if packs and not all(hasattr(stock, name) for name in ("write_kv", "extend_state", "decode_state")):
        raise HQConfigError(
            f"attention backend {stock.__name__} cannot serve packed pages in this version: packed formats run on the CPU "
            "platform (SGLANG_PLATFORM=sgl_hq_cpu --device cpu); use --hq-format exact here"
        )
    backend.__class__ = type("HQ" + stock.__name__, (HQAttnBackendMixin, stock), {})
    backend._plan = None
    backend.forward_runs = None  # set with the radix cache: () -> (rows, packed runs) of the batch about to run
    backend.packed_tokens_read = 0  # totals over forwards, once per group
    backend.packed_tokens_attended = 0  # the same, once per request of the group
