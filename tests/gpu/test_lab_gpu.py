"""The lab on a GPU: its clock against torch.profiler, its oracle and its frontier against the CPU. No server, no checkpoint."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def config():
    """A few layers that are large enough for a share of attention to be measured: Qwen2.5-7B's, 4 of its 28."""
    from transformers import Qwen2Config

    from sgl_hq.launch.bench_model import QWEN_7B

    return Qwen2Config(**QWEN_7B | {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4})


def test_the_cuda_clock_agrees_with_the_profilers_kernels(config, tmp_path):
    """Another measurement of the same steps: durations of the kernels alone, by the operator that launched them."""
    from torch.profiler import ProfilerActivity, profile

    from sgl_hq.lab.attention_share import WARM_UP_STEPS, measure_share
    from sgl_hq.lab.dummy_weights import model_with_dummy_weights, random_ids

    config.save_pretrained(tmp_path)
    model = model_with_dummy_weights(str(tmp_path), "cuda")
    ids = random_ids(model, 4097)
    share = measure_share(model, ids, 16, 10)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        again = measure_share(model, ids, 16, 10)
    calls = [e for e in profiled.events() if e.name == "aten::scaled_dot_product_attention"]
    in_steps = calls[config.num_hidden_layers :]  # the prefill came first
    seconds = sum(e.device_time_total for e in in_steps) / 1e6 / (len(in_steps) / config.num_hidden_layers)
    assert len(in_steps) >= config.num_hidden_layers * (WARM_UP_STEPS + 10)
    assert share.p_attn == pytest.approx(again.p_attn, rel=0.15)
    assert seconds == pytest.approx(sum(again.attention_s) / 10, rel=0.35)  # events add the copy of the output, and gaps
    assert share.read_gb_per_s > 50


def test_the_oracle_says_the_same_as_on_a_cpu(config):
    """Float32 in both; another order of summation may choose another block where two are equal to rounding."""
    import torch

    from sgl_hq.lab.oracle import measure_text
    from sgl_hq.lab.selectors import parse_selectors

    model = _small(config, head_dim=32)
    ids = torch.randint(model.config.vocab_size, (512 + 9,), generator=torch.Generator().manual_seed(1)).tolist()
    selectors = parse_selectors("global_block_mass:f=0.25:b=16,recent_sink:sink=4:recent=64,quest:f=0.25:b=16:dense=1,quest:f=1:b=16")
    on_cpu, on_gpu = (measure_text(model.to(device), "text", ids, 512, selectors) for device in ("cpu", "cuda"))
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        assert (gpu.selector, gpu.step) == (cpu.selector, cpu.step)
        assert gpu.kept_fraction == pytest.approx(cpu.kept_fraction, abs=0.01)
        assert gpu.rel_l2 == pytest.approx(cpu.rel_l2, rel=0.2, abs=1e-4)
        assert gpu.mse == pytest.approx(cpu.mse, rel=0.3, abs=1e-5)
    assert {row.mse for row in on_gpu if row.selector == "quest:f=1:b=16"} == {0.0}


def test_every_format_is_measured_as_on_a_cpu(config):
    """The gate's figures and the frontier's cosines. Another rounding of K and V in float32 moves a value here and there to the
    next code: a few in a thousand of the packed values, so the figures of a lossy format agree to some per cent."""
    import torch

    from sgl_hq.baselines import BASELINES
    from sgl_hq.gate.codecs import codec_of
    from sgl_hq.gate.measure import measure_window
    from sgl_hq.lab.cosines import measure_cosines
    from sgl_hq.page_format import FORMATS

    names = (*FORMATS, *BASELINES)
    model = _small(config, head_dim=64)
    ids = torch.randint(model.config.vocab_size, (128 + 9,), generator=torch.Generator().manual_seed(1)).tolist()
    found = []
    for device in ("cpu", "cuda"):
        codecs = [codec_of(name, device=device) for name in names]
        trials = measure_window(model.to(device), "text", ids, [64, 128], 8, codecs)
        found.append((trials, measure_cosines(model, [ids[:-1]], [128], 8, codecs)))
    (cpu_trials, cpu_cosines), (gpu_trials, gpu_cosines) = found
    for name in names:
        for cpu, gpu in zip(cpu_trials[name], gpu_trials[name], strict=True):
            assert (gpu.stored_bits, gpu.effective_bits) == (cpu.stored_bits, cpu.effective_bits)
            assert gpu.mse_mean == pytest.approx(cpu.mse_mean, rel=0.1, abs=1e-9), name
        assert gpu_cosines[name].score_cos_mean == pytest.approx(cpu_cosines[name].score_cos_mean, abs=1e-3), name
        assert gpu_cosines[name].output_cos_mean == pytest.approx(cpu_cosines[name].output_cos_mean, abs=1e-3), name


def _small(config, head_dim: int):
    """Random weights, float32, on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 448, "intermediate_size": 512, "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": head_dim}
    return AutoModelForCausalLM.from_config(config.__class__(**config.to_dict() | shape), dtype=torch.float32).eval()
