"""What HypercubeQuant cannot be combined with, each refusal one sentence with the remedy.

Every entry is a path of SGLang that copies KV slots by id, keeps its own radix tree, or attends to less than the
whole prefix; it would read packed ids as physical slots (design.md section 10, "v1 limits").
"""

from __future__ import annotations

from typing import Any, Callable

from sgl_hq.config import HQConfig, HQConfigError
from sgl_hq.page_format import calibrated_bits, get_format

_Flag = tuple[Callable[[Any], bool], str, str]

# (predicate on ServerArgs as the user gave them, what it is, what to do)
_FLAGS: tuple[_Flag, ...] = (
    (lambda a: a.speculative_algorithm is not None, "speculative decoding", "drop --speculative-algorithm"),
    (lambda a: a.enable_hierarchical_cache, "HiCache", "drop --enable-hierarchical-cache"),
    (lambda a: a.enable_lmcache, "LMCache", "drop --enable-lmcache"),
    (lambda a: a.enable_flexkv, "FlexKV", "drop --enable-flexkv"),
    (lambda a: a.enable_hisparse, "hierarchical sparse attention", "drop --enable-hisparse"),
    (lambda a: a.disaggregation_mode != "null", "prefill-decode disaggregation", "drop --disaggregation-mode"),
    (lambda a: a.encoder_only, "an encoder-only server", "drop --encoder-only"),
    (lambda a: a.tp_size > 1, "tensor parallelism (not tested yet)", "use --tp-size 1"),
    (lambda a: a.pp_size > 1, "pipeline parallelism", "use --pp-size 1"),
    (lambda a: a.dp_size > 1, "data parallelism (not tested yet)", "use --dp-size 1"),
    (lambda a: a.dcp_size > 1 or a.attn_cp_size > 1 or a.enable_prefill_cp, "context parallelism", "drop the context parallel options"),
    (lambda a: a.enable_two_batch_overlap, "two-batch overlap", "drop --enable-two-batch-overlap"),
    (lambda a: a.enable_pdmux, "PD multiplexing", "drop --enable-pdmux"),
    (lambda a: a.dllm_algorithm is not None, "diffusion language models", "drop --dllm-algorithm"),
    (lambda a: a.enable_streaming_session, "streaming sessions", "drop --enable-streaming-session"),
    (lambda a: a.enable_session_radix_cache, "the session radix cache", "drop --enable-session-radix-cache"),
    (lambda a: a.enable_unified_memory, "the unified memory pool", "drop --enable-unified-memory"),
    (lambda a: a.enable_page_major_kv_layout, "the page-major KV layout", "drop --enable-page-major-kv-layout"),
    (lambda a: a.prefill_only_disable_kv_cache, "a server without KV cache", "drop --prefill-only-disable-kv-cache"),
    (lambda a: a.enable_memory_saver, "the memory saver", "drop --enable-memory-saver"),
    (lambda a: a.enable_deterministic_inference, "deterministic inference", "drop --enable-deterministic-inference"),
    # It checks the slots of every row in every step. Rows keep the dense slots of a prefix that has been packed since, and packed ids are
    # beyond its buffers; it walks SGLang's own trees only (`kv_canary/radix_cache_walker.py`). `--hq-audit` checks what lies in pages.
    (lambda a: a.kv_canary != "none", "the KV canary", "drop --kv-canary"),
    (lambda a: a.disable_radix_cache, "a disabled radix cache (packed pages are shared through it)", "drop --disable-radix-cache"),
    (lambda a: a.kv_cache_dtype not in ("auto", "bf16", "bfloat16"), "a quantised dense KV cache", "use --kv-cache-dtype auto"),
    (lambda a: a.radix_cache_backend not in (None, "hq"), "another radix cache backend", "drop --radix-cache-backend"),
)


def check_flags(args: Any, config: HQConfig) -> None:
    """`args`: ServerArgs before SGLang resolved them. Raises HQConfigError on the first unsupported combination."""
    for applies, what, remedy in _FLAGS:
        if applies(args):
            raise HQConfigError(
                f"{what} cannot be combined with --hq-format {config.format}: {remedy}, or drop --hq-format"
            )
    if args.page_size not in (None, config.page_size):
        raise HQConfigError(
            f"--page-size {args.page_size} does not match packed pages of {config.page_size} tokens: "
            f"use --page-size {config.page_size} or leave it out"
        )


def check_model(model: Any, config: HQConfig) -> None:
    """`model`: SGLang's ModelConfig. Raises HQConfigError for attention that packed pages cannot serve."""
    text = model.hf_text_config
    reason = None
    if str(model.attention_arch).endswith("MLA"):
        reason = "uses multi-head latent attention (MLA), whose cache is not per-head K and V"
    elif model.is_hybrid_swa or _window(text) is not None:
        reason = "attends to a sliding window, so a shared prefix is not read whole"
    elif model.is_encoder_decoder:
        reason = "is an encoder-decoder model"
    elif not model.is_generation:
        reason = "is not a text generation model"
    elif any(getattr(text, name, None) for name in ("mamba_d_state", "linear_num_value_heads", "linear_attn_config")):
        reason = "keeps recurrent state beside its KV cache"
    elif getattr(model, "has_attention_sinks", False):
        reason = "has learned attention sinks"
    elif getattr(text, "attention_chunk_size", None):
        reason = "attends to chunks"
    elif model.head_dim != model.v_head_dim:
        reason = f"has K and V heads of different size ({model.head_dim} and {model.v_head_dim})"
    if reason:
        name = ", ".join(model.hf_config.architectures or ["this model"])
        raise HQConfigError(
            f"{name} {reason}: --hq-format {config.format} cannot serve it, drop the --hq-* options to serve it with plain SGLang"
        )


_GPU_BACKENDS = ("flashinfer", "fa3", "triton")
_FLASHINFER_MERGE_VALUES = 8192  # query heads * head_dim of one row: 1,024 threads of 8 values (`include/flashinfer/attention/cascade.cuh`)


def check_gpu(args: Any, model: Any, config: HQConfig) -> None:
    """`args`: ServerArgs after SGLang resolved them; `config` packs and the device is no CPU. Raises HQConfigError for
    what the kernels or the decode graphs of packed pages do not cover."""
    prefill, decode = args.get_attention_backends()
    graphs = args.cuda_graph_config
    reason = _why_no_kernel(model, config)
    checks = (
        (str(args.device).startswith("cuda"), f"cannot be served on device {args.device}", "use a CUDA device or the CPU platform"),
        (reason is None, f"cannot be read on a GPU ({reason})", "choose another format, or use --hq-format exact"),
        (prefill == decode, f"needs one attention backend, not {prefill} and {decode}", "use --attention-backend alone"),
        (decode in _GPU_BACKENDS, f"cannot use attention backend {decode}", f"use --attention-backend {', '.join(_GPU_BACKENDS)}"),
        (
            decode != "flashinfer" or model.num_attention_heads * model.head_dim <= _FLASHINFER_MERGE_VALUES,
            f"would merge {model.num_attention_heads} query heads, more than FlashInfer's kernel takes", "use --attention-backend fa3",
        ),
        (graphs.decode.backend in ("full", "disabled"), f"cannot use {graphs.decode.backend} decode graphs", "use full"),
        (graphs.prefill.backend in ("breakable", "disabled"), f"cannot use {graphs.prefill.backend} prefill graphs", "use breakable"),
        (not args.enable_torch_compile, "cannot be combined with torch.compile", "drop --enable-torch-compile"),
        (not args.enable_mis, "cannot be combined with multi-item scoring", "drop --enable-mis"),
        (not args.post_capture_kv_sizing_planned(), "cannot be sized after graph capture", "drop SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"),
    )
    for served, what, remedy in checks:
        if not served:
            raise HQConfigError(f"--hq-format {config.format} {what}: {remedy}")


def _why_no_kernel(model: Any, config: HQConfig) -> str | None:
    from sgl_hq.kernels.grouped_attention.launcher import why_not

    if calibrated_bits(config.format) is not None:
        return "calibrated formats have no GPU kernel yet"
    return why_not(get_format(config.format).layout(model.head_dim, model.v_head_dim), model.num_attention_heads, model.get_num_kv_heads(1))


def _window(text: Any) -> int | None:
    """Tokens of the sliding window the model really uses. Qwen2 states one and switches it off."""
    if getattr(text, "use_sliding_window", None) is False:
        return None
    for name in ("sliding_window_size", "sliding_window", "window_size"):
        if getattr(text, name, None) is not None:
            return getattr(text, name)
    return None
