"""What cannot be served together is refused before the model loads, with the remedy."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest

from sgl_hq import compat, preflight
from sgl_hq.config import HQConfig, HQConfigError

CONFIG = HQConfig("hq6")


def _server_args(**changed):
    from sglang.srt.server_args import ServerArgs

    args = ServerArgs.__new__(ServerArgs)  # defaults without SGLang's resolution
    for name, field in ServerArgs.__dataclass_fields__.items():
        setattr(args, name, field.default)
    for name, value in changed.items():
        assert name in ServerArgs.__dataclass_fields__, f"SGLang has no option {name}"
        setattr(args, name, value)
    return args


def test_default_arguments_are_served():
    compat.check_flags(_server_args(), CONFIG)
    compat.check_flags(_server_args(page_size=64), CONFIG)


@pytest.mark.parametrize(
    "changed",
    [
        {"speculative_algorithm": "EAGLE"}, {"enable_hierarchical_cache": True}, {"enable_lmcache": True}, {"enable_flexkv": True},
        {"enable_hisparse": True}, {"disaggregation_mode": "prefill"}, {"encoder_only": True}, {"tp_size": 2}, {"pp_size": 2}, {"dp_size": 2},
        {"dcp_size": 2}, {"attn_cp_size": 2}, {"enable_prefill_cp": True}, {"enable_two_batch_overlap": True}, {"enable_pdmux": True},
        {"dllm_algorithm": "LowConfidence"}, {"enable_streaming_session": True}, {"enable_session_radix_cache": True},
        {"enable_unified_memory": True}, {"enable_page_major_kv_layout": True}, {"prefill_only_disable_kv_cache": True},
        {"enable_memory_saver": True}, {"enable_deterministic_inference": True}, {"disable_radix_cache": True},
        {"kv_canary": "raise"},
        {"kv_cache_dtype": "fp8_e4m3"}, {"radix_cache_backend": "flexkv"}, {"page_size": 48}, {"page_size": 1},
    ],
    ids=lambda c: next(iter(c)),
)
def test_unsupported_flags_are_refused_with_a_remedy(changed):
    with pytest.raises(HQConfigError, match="drop|use"):
        compat.check_flags(_server_args(**changed), CONFIG)


def _model(**changed):
    text = SimpleNamespace(**{k[5:]: v for k, v in changed.items() if k.startswith("text_")})
    model = dict(attention_arch="AttentionArch.MHA", is_hybrid_swa=False, is_encoder_decoder=False, is_generation=True,
                 has_attention_sinks=False, head_dim=64, v_head_dim=64, hf_text_config=text, hf_config=SimpleNamespace(architectures=["TestForCausalLM"]))
    return SimpleNamespace(**model | {k: v for k, v in changed.items() if not k.startswith("text_")})


def test_plain_models_are_served_also_with_a_window_switched_off():
    compat.check_model(_model(), CONFIG)
    compat.check_model(_model(text_sliding_window=32768, text_use_sliding_window=False), CONFIG)


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"attention_arch": "AttentionArch.MLA"}, "MLA"), ({"is_hybrid_swa": True}, "sliding window"),
        ({"text_sliding_window": 4096}, "sliding window"), ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"is_generation": False}, "text generation"), ({"text_mamba_d_state": 16}, "recurrent"), ({"has_attention_sinks": True}, "sinks"),
        ({"text_attention_chunk_size": 8192}, "chunks"), ({"v_head_dim": 128}, "different size"),
    ],
)
def test_models_that_packed_pages_cannot_serve_are_refused(changed, reason):
    with pytest.raises(HQConfigError, match=reason) as refused:
        compat.check_model(_model(**changed), CONFIG)
    assert "TestForCausalLM" in str(refused.value) and "drop the --hq-*" in str(refused.value)


def _on_gpu(**changed):
    usual = {
        "device": "cuda", "backends": ("fa3", "fa3"), "decode": "full", "prefill": "breakable", "enable_torch_compile": False,
        "enable_mis": False,
    }
    args = SimpleNamespace(**usual | changed, post_capture_kv_sizing_planned=lambda: False)
    args.get_attention_backends = lambda: args.backends
    args.cuda_graph_config = SimpleNamespace(decode=SimpleNamespace(backend=args.decode), prefill=SimpleNamespace(backend=args.prefill))
    return args


def _gpu_model(head_dim=128, heads=28, kv_heads=4):
    return SimpleNamespace(head_dim=head_dim, v_head_dim=head_dim, num_attention_heads=heads, get_num_kv_heads=lambda tp: kv_heads // tp)


@pytest.mark.parametrize("backend", ["flashinfer", "fa3", "triton"])
@pytest.mark.parametrize("name", ["bf16", "lossless", "int8", "hq6", "sink4-K5V4"])
def test_packed_formats_are_served_on_a_gpu(backend, name):
    compat.check_gpu(_on_gpu(backends=(backend, backend)), _gpu_model(), HQConfig(name))


@pytest.mark.parametrize(
    "args, model, name, reason",
    [
        ({}, {}, "calib4.5", "calibrated"), ({}, {}, "K5tV4", "per token"), ({}, {"head_dim": 96}, "hq6", "head_dim"),
        ({"backends": ("fa3", "flashinfer")}, {}, "hq6", "one attention backend"), ({"backends": ("fa4", "fa4")}, {}, "hq6", "backend fa4"),
        ({"backends": ("flashinfer", "flashinfer")}, {"heads": 96, "kv_heads": 8}, "hq6", "96 query heads"),
        ({"decode": "breakable"}, {}, "hq6", "breakable decode graphs"), ({"prefill": "full"}, {}, "hq6", "full prefill graphs"),
        ({"prefill": "tc_piecewise"}, {}, "hq6", "tc_piecewise prefill graphs"),
        ({"enable_torch_compile": True}, {}, "hq6", "torch.compile"),
        ({"enable_mis": True}, {}, "hq6", "multi-item"),
    ],
)  # fmt: skip
def test_what_packed_pages_on_a_gpu_cannot_do_is_refused(args, model, name, reason):
    with pytest.raises(HQConfigError, match=reason) as refused:
        compat.check_gpu(_on_gpu(**args), _gpu_model(**model), HQConfig(name))
    assert "use" in str(refused.value) or "drop" in str(refused.value) or "choose" in str(refused.value)


def test_model_path(tmp_path):
    preflight.check_model_path("org/model-on-a-hub")
    for path, reason in [(None, "no model"), ("/nowhere/model", "does not exist"), ("./nowhere", "does not exist"), (str(tmp_path), "no config.json")]:
        with pytest.raises(HQConfigError, match=reason):
            preflight.check_model_path(path)
    (tmp_path / "config.json").write_text("{}")
    preflight.check_model_path(str(tmp_path))


def test_port():
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(HQConfigError, match=f"127.0.0.1:{port}.*choose another --port"):
            preflight.check_port("127.0.0.1", port)
    preflight.check_port("127.0.0.1", port)
