"""The metric predicts what a small error costs: compared with the error itself on a tiny model."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from sgl_hq.calibration.sensitivity import LIMITS, SINK_TOKENS, measure_sensitivity

PREFIX, STEPS, LAYERS, HEADS, DIM = 128, 8, 2, 2, 16


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=HEADS, head_dim=DIM, initializer_range=0.2, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _actual_cost(model, ids, layer, side, scale, draws) -> float:
    """Mean over draws and steps of the logits' squared error per vocabulary entry, as a share of the bound, plus the
    squared relative error of the attention output, mean over layers, as a share of its bound."""
    tokens = torch.tensor([ids])
    prefix = DynamicCache()
    with torch.no_grad():
        model(tokens[:, :PREFIX], past_key_values=prefix)
    generator = torch.Generator().manual_seed(1)

    def run(noise):
        cache, outputs = DynamicCache(), {}
        for i, part in enumerate(prefix.layers):
            k, v = part.keys.bfloat16().float(), part.values.bfloat16().float()
            if noise is not None and i == layer:
                (k if side == 0 else v)[:, :, SINK_TOKENS:] += noise
            cache.update(k, v, i)
        attention = model.model.layers[layer].self_attn
        hook = attention.register_forward_hook(lambda module, args, output: outputs.update(o=output[0][0]))
        with torch.no_grad():
            logits = model(tokens[:, PREFIX:], past_key_values=cache).logits[0]
        hook.remove()
        return logits, outputs["o"]

    dense, dense_output = run(None)
    total = 0.0
    for _ in range(draws):
        noise = scale * torch.randn(1, HEADS, PREFIX - SINK_TOKENS, DIM, generator=generator)
        logits, output = run(noise)
        local = ((output - dense_output).norm(dim=-1) / dense_output.norm(dim=-1)).pow(2).mean()
        total += (logits - dense).pow(2).mean() / LIMITS["mse_max"] + local / LIMITS["rel_l2_max"] ** 2 / LAYERS
    return float(total / draws)


def test_the_metric_predicts_the_cost_of_white_noise():
    """With errors of variance s^2 in every entry the expected cost is s^2 times the trace of the metric.

    500 probes and 200 draws: each estimate is off by a few percent (a quadratic form of that many draws); 20 % leaves room
    and still tells a forgotten factor (2, the steps, the layers, the bound) from the right one.
    """
    model = _model()
    ids = torch.randint(0, 60, (PREFIX + STEPS,), generator=torch.Generator().manual_seed(2)).tolist()
    found = measure_sensitivity(model, [ids], PREFIX, STEPS, 500, lambda: None)
    scale = 1e-3
    for side in (0, 1):
        for layer in range(LAYERS):
            predicted = scale**2 * found[side].metric[layer].diagonal(dim1=-2, dim2=-1).sum().item()
            actual = _actual_cost(model, ids, layer, side, scale, draws=200)
            assert abs(actual / predicted - 1) < 0.2, (side, layer, actual, predicted)


def test_k_is_centred_on_its_page_and_v_is_not():
    model = _model()
    model.model.layers[0].self_attn.v_proj.bias = torch.nn.Parameter(torch.full((HEADS * DIM,), 5.0))
    ids = torch.randint(0, 60, (PREFIX + STEPS,), generator=torch.Generator().manual_seed(2)).tolist()
    _, v = measure_sensitivity(model, [ids], PREFIX, STEPS, 1, lambda: None)
    assert v.covariance[0].diagonal(dim1=-2, dim2=-1).min() > 5.0
