"""`sglang.srt.mem_cache` construction: two tiers from one byte budget."""

from __future__ import annotations

from sgl_hq.config import from_env


def two_tier_configurator(original, kvc):
    """AROUND create_memory_pool_configurator. Mode `exact` keeps SGLang's sizing: the whole budget is dense."""
    from sgl_hq.pool.pool_configurator import HQPoolConfigurator

    config = from_env()
    if not config.packs:
        return original(kvc)
    return HQPoolConfigurator(kvc, config, _workspace_bytes if str(kvc.device).startswith("cuda") else None)


def _workspace_bytes(layouts, shape, sizes, device) -> int:
    """Device bytes that the attention backend will hold for plans and partial results beside tiers of `sizes`."""
    from sglang.srt.runtime_context import get_parallel, get_server_args

    from sgl_hq.attention.hq_attn_backend import plan_bytes
    from sgl_hq.patches.attention import eager_rows

    args = get_server_args()
    decode = args.cuda_graph_config.decode
    graph_rows = 0 if decode.backend == "disabled" else decode.max_bs
    model = args.get_model_config()
    q_heads = model.num_attention_heads // get_parallel().attn_tp_size
    return plan_bytes(layouts[0], shape, sizes, device, q_heads, graph_rows, eager_rows(args), model.context_len)


def two_tier_oot_pool(original, self, *, max_total_num_tokens):
    """AROUND KVCacheConfigurator._build_oot_mha_kv_pool: same arguments, our pool class."""
    from sglang.srt.platforms import current_platform

    from sgl_hq.pool.two_tier_pool import HQTokenToKVPool

    stock = current_platform.get_mha_kv_pool_cls
    current_platform.get_mha_kv_pool_cls = lambda: HQTokenToKVPool
    try:
        return original(self, max_total_num_tokens=max_total_num_tokens)
    finally:
        current_platform.get_mha_kv_pool_cls = stock


def two_tier_mha_pool(original, self, *, max_total_num_tokens, mha_pool_class, quant_method=None):
    """AROUND KVCacheConfigurator._build_mha_kv_pool: the same on SGLang's own platforms."""
    from sgl_hq.pool.two_tier_pool import HQTokenToKVPool

    return original(self, max_total_num_tokens=max_total_num_tokens, mha_pool_class=HQTokenToKVPool, quant_method=quant_method)
