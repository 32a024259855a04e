"""SGLang's entry point into this package, and the guard against serving without it.

SGLang logs plugin errors and carries on as plain SGLang (`plugins/__init__.py`). A user who asked for HypercubeQuant
must never get that, so every failure here ends the process, and the radix cache factory, without which the server
cannot start, checks that each piece is in place.

The top of this module imports only what cannot fail, because an import error would be swallowed too.
"""

from __future__ import annotations

import os
import sys


def register() -> None:
    """Called by SGLang in every process that loads plugins: launcher, engine, scheduler."""
    try:
        _register()
    except Exception as error:
        if _asked_for():
            print(f"sgl_hq: cannot start: {error}", file=sys.stderr)
            raise SystemExit(2) from error
        raise


def _asked_for() -> bool:
    return bool(os.environ.get("SGLANG_HQ_FORMAT") or os.environ.get("SGL_HQ_FORMAT")) or any(arg.startswith("--hq-") for arg in sys.argv)


def _register() -> None:
    import pkgutil

    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sgl_hq.config import from_env
    from sgl_hq.patches.ledger import LEDGER
    from sgl_hq.patches.probe import check_patch, check_version

    active = from_env() is not None
    patches = [patch for patch in LEDGER if patch.always or active]
    problem = check_version() or next(filter(None, map(check_patch, patches)), None)
    if problem:
        raise RuntimeError(problem)
    for patch in patches:
        HookRegistry.register(patch.target, pkgutil.resolve_name(patch.hook), HookType(patch.kind))
    if active:
        from sglang.srt.mem_cache.registry import get_radix_cache_factory, register_radix_cache_backend

        if get_radix_cache_factory("hq") is None:
            register_radix_cache_backend("hq", build_radix_cache)


def build_radix_cache(context):
    """SGLang's factory for `--radix-cache-backend hq` (mem_cache/registry.py). Raises RuntimeError if a piece is missing."""
    from sglang.srt.layers.radix_attention import RadixAttention

    from sgl_hq.cache.packing_radix_cache import PackingRadixCache
    from sgl_hq.config import from_env
    from sgl_hq.patches.requests import bind_tree
    from sgl_hq.pool.allocator_warm_up import warm_up_allocator

    runner = context.tp_worker.model_runner
    config = from_env()
    _assert_in_place(runner, config)
    if str(runner.device).startswith("cuda"):
        if not context.server_args.disable_overlap_schedule:
            runner.token_to_kv_pool.forward_stream = runner.forward_stream
        if config.packs:
            warm_up_allocator(context.params.page_size, context.params.req_to_token_pool.size, runner.device)
    tree = PackingRadixCache(context.params, runner.token_to_kv_pool, config.pack)
    bind_tree(tree)
    runner.attn_backend.forward_runs = tree.live.forward_runs
    if config.packs:
        layers = [m for m in runner.model.modules() if isinstance(m, RadixAttention)]
        for layer in layers:
            reason = layer.why_not_packable()
            if reason:
                raise RuntimeError(f"sgl_hq: layer {layer.layer_id} cannot read packed pages: {reason}; drop --hq-format")
    return tree


def _assert_in_place(runner, config) -> None:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.plugins.hook_registry import HookRegistry

    from sgl_hq.attention.hq_attn_backend import HQAttnBackendMixin
    from sgl_hq.attention.hq_radix_attention import HQRadixAttention
    from sgl_hq.patches.ledger import LEDGER
    from sgl_hq.pool.two_tier_pool import HQTokenToKVPool

    missing = [patch.target for patch in LEDGER if patch.target not in HookRegistry._patched]
    if not isinstance(runner.token_to_kv_pool, HQTokenToKVPool):
        missing.append(f"pool ({type(runner.token_to_kv_pool).__name__})")
    if RadixAttention is not HQRadixAttention:
        missing.append("RadixAttention")
    if not isinstance(runner.attn_backend, HQAttnBackendMixin):
        missing.append(f"attention backend ({type(runner.attn_backend).__name__})")
    if missing:
        raise RuntimeError(
            f"sgl_hq: --hq-format {config.format} was asked for but is not in place: {', '.join(missing)}. "
            "The log above says why a hook failed; `sgl-hq doctor` checks the installation."
        )
