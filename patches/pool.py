"""`sglang.srt.mem_cache` construction: two tiers from one byte budget."""

from __future__ import annotations

from sgl_hq.config import from_env


def two_tier_configurator(original, kvc):
    """AROUND create_memory_pool_configurator. Mode `exact` keeps SGLang's sizing: the whole budget is dense."""
    from sgl_hq.pool.pool_configurator import HQPoolConfigurator

    config = from_env()
    return HQPoolConfigurator(kvc, config) if config.packs else original(kvc)


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
