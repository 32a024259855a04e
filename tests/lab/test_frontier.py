"""Cosines beside the gate's figures: their meaning, their order, absolute positions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from sgl_hq.gate.attention_hook import project_output
from sgl_hq.gate.codecs import codec_of
from sgl_hq.gate.run import load_model
from sgl_hq.gate.windows import CORE, shipped_windows
from sgl_hq.lab.cosines import measure_cosines
from sgl_hq.lab.frontier import frontier_cost, frontier_rows, pareto

IDS = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(3)).tolist()


class Changed:
    """bf16 pages, K and V multiplied on the way out."""

    def __init__(self, name: str, of_k: float, of_v: float) -> None:
        self.name, self.of_k, self.of_v, self.inner = name, of_k, of_v, codec_of("bf16")

    def pack(self, layer, k, v):
        return self.inner.pack(layer, k, v)

    def unpack(self, layer, packed):
        k, v = self.inner.unpack(layer, packed)
        return k * self.of_k, v * self.of_v


def test_what_the_cosines_see_and_what_they_do_not(loaded):
    codecs = [codec_of("bf16"), Changed("longer", 2, 1), Changed("turned", -1, 1), Changed("values", 1, -1)]
    found = measure_cosines(loaded.model, [IDS], (128,), 16, codecs)
    same, longer, turned, values = (found[codec.name] for codec in codecs)
    exactly = pytest.approx(1, abs=1e-6)
    assert (same.score_cos_min, same.output_cos_min) == (exactly, exactly)
    assert longer.score_cos_min == exactly and longer.output_cos_mean < 0.999  # sharper, which only the output shows
    assert (turned.score_cos_mean, turned.score_cos_min) == (pytest.approx(-1, abs=1e-6),) * 2
    assert values.score_cos_min == exactly and values.output_cos_mean < 0  # the suffix keeps its V, the prefix does not


@torch.inference_mode()
def test_cosines_of_one_layer_by_hand(loaded):
    """hq4 in layer 0, whose queries need no attention before them."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model, codec = loaded.model.model, codec_of("hq4")
    tokens, position = torch.tensor([IDS[:144]]), torch.arange(144)[None]
    layer = model.layers[0]
    hidden = layer.input_layernorm(model.embed_tokens(tokens))
    q, k, v = (
        linear(hidden).unflatten(-1, (-1, 16)).transpose(1, 2)
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *model.rotary_emb(hidden, position))
    k, v = k.bfloat16().float()[0], v.bfloat16().float()[0]
    k_packed, v_packed = codec.unpack(0, codec.pack(0, *(side[:, :128].transpose(0, 1).bfloat16() for side in (k, v))))
    of_scores, of_outputs = [], []
    for head in range(4):
        kv = head // 2
        for step in range(128, 144):
            query, outputs = q[0, head, step], []
            of_scores.append(functional.cosine_similarity(k_packed[kv] @ query, k[kv, :128] @ query, dim=0))
            for prefix_k, prefix_v in ((k_packed[kv], v_packed[kv]), (k[kv, :128], v[kv, :128])):
                keys, values = (torch.cat([side, rest[kv, 128 : step + 1]]) for side, rest in ((prefix_k, k), (prefix_v, v)))
                outputs.append((keys @ query / 4).softmax(0) @ values)
            of_outputs.append(functional.cosine_similarity(*outputs, dim=0))
    found = measure_cosines(_first_layers(loaded.model, 1), [IDS], (128,), 16, [codec])["hq4"]
    by_hand = [f(torch.stack(side)).item() for side in (of_scores, of_outputs) for f in (torch.mean, torch.min)]
    assert [found.score_cos_mean, found.score_cos_min, found.output_cos_mean, found.output_cos_min] == pytest.approx(by_hand, abs=1e-4)


def _first_layers(model, layers: int):
    import copy

    shorter = copy.deepcopy(model)
    shorter.model.layers = shorter.model.layers[:layers]
    shorter.config.num_hidden_layers = layers
    return shorter


def test_rows_hold_both_kinds_of_figures_smallest_first(loaded):
    costs = []
    windows = shipped_windows(CORE[:2])
    rows = frontier_rows(loaded, windows, (64, 128), 8, [codec_of(n) for n in ("int8", "hq2", "hq4", "hq6", "bf16")], advance=costs.append)
    assert sum(costs) == frontier_cost(2, 2, 5)
    assert [row["format"] for row in rows] == ["hq2", "hq4", "hq6", "int8", "bf16"]
    assert [row["stored_bits"] for row in rows] == sorted(row["stored_bits"] for row in rows)
    by_name = {row["format"]: row for row in rows}
    for figure in ("score_cos_mean", "output_cos_mean"):
        assert by_name["hq2"][figure] < by_name["hq4"][figure] < by_name["int8"][figure] < 1 + 1e-6
    assert by_name["bf16"]["mse_max"] == 0 and by_name["bf16"]["trials"] == 4
    assert by_name["hq2"]["mse_mean"] > by_name["hq4"]["mse_mean"] > 0 and by_name["hq2"]["effective_bits"] < by_name["hq2"]["stored_bits"]


def test_pareto():
    rows = [
        {"format": n, "stored_bits": bits, "mse": mse, "cos": cos}
        for n, bits, mse, cos in (("a", 4, 0.5, 0.9), ("b", 2, 1.0, 0.8), ("c", 3, 1.0, 0.7), ("d", 4, 0.4, 0.95), ("e", 8, math.inf, 0.99))
    ]
    assert pareto(rows, "mse") == ["b", "d"]
    assert pareto(rows, "cos", larger_is_better=True) == ["b", "d", "e"]


@torch.inference_mode()
def test_gpt2_projects_its_output_through_a_transposed_map(tiny_gpt2):
    module = load_model(str(tiny_gpt2)).model.transformer.h[1].attn
    output = torch.randn(1, 7, 4, 16, generator=torch.Generator().manual_seed(0))
    expected = module.c_proj(output.flatten(2))[0] - module.c_proj.bias
    torch.testing.assert_close(project_output(module, output), expected, rtol=0, atol=1e-6)
