"""The patches, as data."""

from __future__ import annotations

from dataclasses import dataclass

SUPPORTED_SGLANG = "0.5.17"


@dataclass(frozen=True)
class Patch:
    """One hook on one SGLang function.

    target: dotted name. kind: SGLang's HookType (before, after, around, replace). hook: `module:function` of ours.
    parameters: the target's parameter names in SUPPORTED_SGLANG; a difference means that SGLang changed under us.
    always: registered in every process, so that the flags exist; the others only when HQ is asked for.
    why: what official extension point is missing. delete_when: what would make the entry unnecessary.
    """

    target: str
    kind: str
    hook: str
    parameters: tuple[str, ...]
    why: str
    delete_when: str
    always: bool = False


LEDGER: tuple[Patch, ...] = (
    Patch(
        "sglang.srt.server_args.ServerArgs.add_cli_args", "around", "sgl_hq.patches.server_args:add_flags", ("parser",),
        "plugins cannot add command-line flags", "SGLang lets plugins extend its parser", always=True,
    ),
    Patch(
        "sglang.srt.server_args.ServerArgs.from_cli_args", "around", "sgl_hq.patches.server_args:flags_to_env", ("cls", "args"),
        "unknown parsed flags are dropped silently; children inherit only the environment", "as above", always=True,
    ),
    Patch(
        "sglang.srt.server_args.ServerArgs.__post_init__", "around", "sgl_hq.patches.server_args:resolve", ("self",),
        "defaults and refusals must also hold for sgl.Engine, which has no command line",
        "SGLang 0.5.23: register_resolution_hook", always=True,
    ),
    Patch(
        "sglang.srt.model_executor.pool_configurator.create_memory_pool_configurator", "around",
        "sgl_hq.patches.pool:two_tier_configurator", ("kvc",),
        "the KV byte budget must be split before the pool is built", "platforms may provide a pool configurator",
    ),
    Patch(
        "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_oot_mha_kv_pool", "around",
        "sgl_hq.patches.pool:two_tier_oot_pool", ("self", "max_total_num_tokens"),
        "a plugin cannot choose the MHA pool class without owning the platform", "SGLang 0.5.23: get_kv_pool_cls on any platform",
    ),
    Patch(
        "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_mha_kv_pool", "around",
        "sgl_hq.patches.pool:two_tier_mha_pool", ("self", "max_total_num_tokens", "mha_pool_class", "quant_method"),
        "the same on SGLang's own platforms", "as above",
    ),
    Patch(
        "sglang.srt.layers.attention.attention_registry.attn_backend_wrapper", "after", "sgl_hq.patches.attention:install_backend",
        ("runner", "full_attn_backend"),
        "the backend name must stay the stock one (it decides Triton use and page size), so no backend of ours is registered",
        "backends may be wrapped by plugins",
    ),
    Patch(
        "sglang.srt.layers.radix_attention.RadixAttention", "replace", "sgl_hq.attention.hq_radix_attention:HQRadixAttention",
        ("num_heads", "head_dim", "scaling", "num_kv_heads", "layer_id", "logit_cap", "v_head_dim", "sliding_window_size",
         "is_cross_attention", "pos_encoding_mode", "logit_capping_method", "quant_config", "attn_type", "use_irope", "prefix"),
        "the layer owns its slice of the packed arena and computes its packed state", "attention layers come from a registry",
    ),
    Patch(
        "sglang.srt.mem_cache.allocation.alloc_for_extend", "after", "sgl_hq.patches.requests:rows_allocated", ("batch",),
        "no event says that a request got its row: the moment to count users and pack", "the radix cache is told of allocations",
    ),
    Patch(
        "sglang.srt.mem_cache.memory_pool.ReqToTokenPool.free", "before", "sgl_hq.patches.requests:row_freed", ("self", "req"),
        "no event says that a row was given back", "as above",
    ),
    Patch(
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new", "after", "sgl_hq.patches.requests:start_forward",
        ("cls", "batch", "model_runner", "capture_hidden_mode", "return_hidden_states_before_norm"),
        "the attention backend does not see the requests of a batch", "ForwardBatch carries request handles",
    ),
    Patch(
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.capture_one_shape", "around",
        "sgl_hq.patches.graphs:capture_both_variants", ("self", "size", "forward", "stream_idx", "variant_label"),
        "a backend cannot ask for a second graph of a batch size", "backends may declare graph variants",
    ),
    Patch(
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner._resolve_lora_variant", "around",
        "sgl_hq.patches.graphs:pick_variant", ("self", "forward_batch"),
        "the choice between graph variants of a batch size knows LoRA only", "as above",
    ),
    Patch(
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.can_run_graph", "around",
        "sgl_hq.patches.graphs:runs_in_graph", ("self", "forward_batch"),
        "a backend cannot say that a batch does not fit its graph buffers", "backends are asked",
    ),
    Patch(
        "sglang.srt.managers.tp_worker.TpModelWorker.get_worker_info", "around", "sgl_hq.patches.long_requests:longest_request", ("self",),
        "a request may be no longer than the dense tier, though packed pages of its prefix take nothing of it",
        "pools state the longest request",
    ),
    Patch(
        "sglang.srt.managers.scheduler.Scheduler.init_req_max_new_tokens", "around", "sgl_hq.patches.long_requests:longest_answer",
        ("self", "req"), "the same bound on prompt and answer together", "as above",
    ),
    Patch(
        "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req", "around", "sgl_hq.patches.long_requests:admit",
        ("self", "req", "has_chunked_req", "truncation_align_size"),
        "how much of a request is packed is known only when its prefix is matched", "as above",
    ),
    Patch(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request", "before", "sgl_hq.patches.bad_requests:check",
        ("self", "obj", "input_ids"), "token ids outside the vocabulary, empty prompts and fractions end the scheduler, and with it all requests",
        "SGLang checks them", always=True,
    ),
    Patch(
        "sglang.srt.managers.scheduler.Scheduler.get_internal_state", "after", "sgl_hq.patches.scheduler:add_state", ("self", "recv_req"),
        "/server_info has no section for plugins", "it has one",
    ),
    Patch(
        "sglang.srt.managers.scheduler.Scheduler.process_batch_result", "after", "sgl_hq.patches.scheduler:batch_done",
        ("self", "batch", "result"),
        "no event says that a batch is done: the moment to end packings, to export metrics and to audit", "plugins are told of batches",
    ),
    Patch(
        "sglang.srt.managers.scheduler.Scheduler.on_idle", "before", "sgl_hq.patches.scheduler:idle", ("self",),
        "packings and metrics of the last batches would stay behind when requests end", "as above",
    ),
)
