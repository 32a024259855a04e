"""What `sgl-hq bench kernels` compares with: decode attention of FlashInfer, FlashAttention-3 and SGLang's Triton kernels.

Each is called as SGLang 0.5.17 calls it under a decode CUDA graph. A baseline is built from page tables and layers and is a
list of calls, one a layer, and their outputs. FlashInfer's plans lie outside the graph, as they do in a server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sgl_hq.page_format import PAGE_TOKENS

if TYPE_CHECKING:
    import torch

    from sgl_hq.kernels.grouped_attention.bench import Layer, Tables

WORKSPACE_BYTES = 512 << 20  # what SGLang gives FlashInfer for Qwen2 models
TRITON_KV_SPLITS = 8  # SGLang's default


class NotHere(RuntimeError):
    """A baseline that this environment cannot run; the message says what is missing."""


@dataclass(frozen=True)
class Baseline:
    """calls[i] computes layer i into outs[i]; `layers` hold the values it reads; value_bytes: of one stored K or V value."""

    calls: list[Callable[[], object]]
    outs: list[torch.Tensor]
    layers: Sequence[Layer]
    value_bytes: int = 2


def flashinfer(tables: Tables, layers: Sequence[Layer]) -> Baseline:
    """FlashInfer's batch decode, fa2, tensor cores on, bfloat16; pages of one token, as SGLang always plans it."""
    run = _decode_plan(slot_table(tables.request_pages), tables, layers[0].q.dtype)
    outs = _outs(layers)
    return Baseline([_bind(run, layer, out) for layer, out in zip(layers, outs)], outs, layers)


def flashinfer_fp8(tables: Tables, layers: Sequence[Layer]) -> Baseline:
    """The same with K and V in fp8_e4m3, unscaled; queries stay bfloat16, as SGLang does it."""
    import torch

    fp8, exact = torch.float8_e4m3fn, [copy(layer) for layer in layers]
    stored = [(layer.k.to(fp8), layer.v.to(fp8)) for layer in layers]
    run = _decode_plan(slot_table(tables.request_pages), tables, fp8)
    outs, calls = _outs(layers), []
    for layer, out, (k, v) in zip(layers, outs, stored):
        calls.append(lambda q=layer.q, kv=(k, v), out=out: run(q, kv, out=out))
    exact[0].k, exact[0].v = (side.to(torch.bfloat16) for side in stored[0])  # the check reads the first layer: what it stores
    return Baseline(calls, outs, exact, value_bytes=1)


def flashinfer_cascade(tables: Tables, layers: Sequence[Layer]) -> Baseline:
    """FlashInfer's MultiLevelCascadeAttentionWrapper, level 0 the prefixes, level 1 the private tokens, pages of 64."""
    import torch
    from flashinfer import MultiLevelCascadeAttentionWrapper

    case = tables.case
    groups, rows = (torch.arange(n + 1, dtype=torch.int32, device="cuda") for n in (case.prefixes, case.requests))
    full = [torch.full((n,), PAGE_TOKENS, dtype=torch.int32, device="cuda") for n in (case.prefixes, case.requests)]
    wrapper = MultiLevelCascadeAttentionWrapper(2, _workspace(), "NHD")
    wrapper.plan(
        [groups * case.rows_per_prefix, rows],
        [groups * case.prefix_pages, rows * case.private_pages],
        [tables.prefix_pages.flatten().int(), tables.private_pages.flatten().int()],
        full,
        case.q_heads,
        case.kv_heads,
        case.head_dim,
        PAGE_TOKENS,
        q_data_type=layers[0].q.dtype,
        kv_data_type=layers[0].k.dtype,
    )
    outs: list[Any] = [None] * len(layers)

    def run(i: int) -> None:
        outs[i] = wrapper.run(layers[i].q, tuple(side.unflatten(0, (-1, PAGE_TOKENS)) for side in (layers[i].k, layers[i].v)))

    return Baseline([lambda i=i: run(i) for i in range(len(layers))], outs, layers)


def fa3(tables: Tables, layers: Sequence[Layer]) -> Baseline:
    """FlashAttention-3 of sgl_kernel, page table of single tokens (SGLang's default page size), scheduler metadata beforehand."""
    import torch

    try:
        from sgl_kernel.flash_attn import flash_attn_with_kvcache, get_scheduler_metadata
    except ImportError as error:
        raise NotHere(f"sgl_kernel's flash_ops is not installed here ({error})") from error

    case, tokens = tables.case, tables.case.prefix_tokens + tables.case.private_tokens
    lengths = torch.full((case.requests,), tokens, dtype=torch.int32, device="cuda")
    starts = torch.arange(case.requests + 1, dtype=torch.int32, device="cuda")
    plan = get_scheduler_metadata(
        batch_size=case.requests,
        max_seqlen_q=1,
        max_seqlen_k=tokens,
        num_heads=case.q_heads,
        num_heads_k=case.kv_heads,
        headdim=case.head_dim,
        cache_seqlens=lengths,
        cu_seqlens_q=starts,
        page_size=1,
        causal=True,
    )
    where = {"page_table": slot_table(tables.request_pages), "cache_seqlens": lengths, "cu_seqlens_q": starts, "max_seqlen_q": 1}
    outs: list[Any] = [None] * len(layers)

    def run(i: int) -> None:
        k, v = layers[i].k[:, None], layers[i].v[:, None]
        scale = case.head_dim**-0.5
        outs[i] = flash_attn_with_kvcache(layers[i].q, k, v, **where, softmax_scale=scale, causal=True, scheduler_metadata=plan)

    return Baseline([lambda i=i: run(i) for i in range(len(layers))], outs, layers)


def triton(tables: Tables, layers: Sequence[Layer]) -> Baseline:
    """SGLang's Triton decode kernels, up to 8 splits of a request's tokens by SGLang's own rule."""
    import torch
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
    from sglang.kernels.ops.attention.metadata import get_num_kv_splits_triton

    case, slots = tables.case, slot_table(tables.request_pages)
    lengths = torch.full((case.requests,), slots.shape[1], dtype=torch.int32, device="cuda")
    splits = torch.empty_like(lengths)
    cores = torch.cuda.get_device_properties("cuda").multi_processor_count
    heads = case.q_heads, case.kv_heads
    get_num_kv_splits_triton[(1,)](splits, lengths, case.requests, 1, *heads, TRITON_KV_SPLITS, cores, MAX_NUM_SEQ=256)
    shape = case.requests, case.q_heads, TRITON_KV_SPLITS
    partial = torch.empty(*shape, case.head_dim, dtype=torch.float32, device="cuda")
    partial_lse = torch.empty(shape, dtype=torch.float32, device="cuda")
    indptr, indices, outs = _indptr(slots), slots.flatten(), _outs(layers)
    scratch = indptr, indices, partial, partial_lse, splits, TRITON_KV_SPLITS, case.head_dim**-0.5, 1.0, 1.0
    calls = [lambda x=layer, out=out: decode_attention_fwd(x.q, x.k, x.v, out, *scratch) for layer, out in zip(layers, outs)]
    return Baseline(calls, outs, layers)


BASELINES: dict[str, Callable[[Tables, Sequence[Layer]], Baseline]] = {
    "flashinfer bf16": flashinfer,
    "flashinfer fp8_e4m3": flashinfer_fp8,
    "flashinfer cascade": flashinfer_cascade,
    "fa3": fa3,
    "triton": triton,
}
REFERENCE = "flashinfer bf16"  # what ratios are against


def slot_table(pages: torch.Tensor) -> torch.Tensor:
    """`[rows, tokens] int32`: FlashInfer's and FA3's page table for pages of one token."""
    from sgl_hq.kernels.grouped_attention.bench import slots_of

    return slots_of(pages).int()


def _decode_plan(slots: torch.Tensor, tables: Tables, kv_dtype: torch.dtype) -> Callable[..., Any]:
    """The `run` of a planned decode wrapper in CUDA-graph mode; `slots` as in `slot_table`."""
    import torch
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    case, indptr, indices = tables.case, _indptr(slots), slots.flatten()
    last = torch.ones(len(slots), dtype=torch.int32, device="cuda")
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        _workspace(),
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=True,
        backend="fa2",
        paged_kv_indptr_buffer=indptr.clone(),
        paged_kv_indices_buffer=indices.clone(),
        paged_kv_last_page_len_buffer=last.clone(),
    )
    types = {"q_data_type": torch.bfloat16, "data_type": kv_dtype}
    wrapper.plan(indptr, indices, last, case.q_heads, case.kv_heads, case.head_dim, 1, **types)
    return wrapper.run


def _indptr(slots: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.arange(len(slots) + 1, dtype=torch.int32, device="cuda") * slots.shape[1]


def _workspace() -> torch.Tensor:
    import torch

    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")


def _outs(layers: Sequence[Layer]) -> list[torch.Tensor]:
    import torch

    return [torch.empty_like(layer.q) for layer in layers]


def _bind(run: Callable[..., Any], layer: Layer, out: torch.Tensor) -> Callable[[], object]:
    return lambda: run(layer.q, (layer.k, layer.v), out=out)
