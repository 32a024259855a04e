"""The two arms on a tiny model: what must be zero is zero, steps are steps, errors propagate and are seen."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from sgl_hq.gate.attention_probe import AttentionProbe
from sgl_hq.gate.codecs import codec_of, lossy_presets
from sgl_hq.gate.errors import GateError
from sgl_hq.gate.figures import summarize
from sgl_hq.gate.measure import measure_window, window_cost
from sgl_hq.gate.run import check_sizes, load_model, measure
from sgl_hq.gate.windows import CORE, HOLD_OUT, Window, shipped_windows, windows_of_files
from sgl_hq.hq_cache import HQCache

IDS = torch.randint(0, 256, (300,), generator=torch.Generator().manual_seed(3)).tolist()


class Noisy:
    """bf16 pages whose unpacked V is off by a factor."""

    name = "noisy"

    def __init__(self, factor: float = 1.5) -> None:
        self.inner, self.factor = codec_of("bf16"), factor

    def pack(self, layer, k, v):
        return self.inner.pack(layer, k, v)

    def unpack(self, layer, packed):
        k, v = self.inner.unpack(layer, packed)
        return k, v * self.factor

    def effective_bits_per_dim(self, head_dim, v_head_dim, prefix_tokens):
        return 16.0


def test_the_dense_arm_against_itself_is_zero_and_passes(loaded):
    """bf16 pages restore every bit, so the packed arm's arithmetic is the dense arm's to the last bit."""
    (trials,) = measure_window(loaded.model, "w", IDS[:161], (64, 128), 32, [codec_of("bf16")]).values()
    assert [(t.prefix_tokens, t.mse_max, t.rel_l2_max, t.kl_max, t.topk_min, t.stored_bits) for t in trials] == [
        (64, 0, 0, 0, 1, 16), (128, 0, 0, 0, 1, 16),
    ]  # fmt: skip
    assert summarize(trials)["verdict"] == "pass"


def test_lossy_formats_err_more_with_fewer_bits_and_a_broken_codec_fails(loaded):
    codecs = [codec_of("int8"), codec_of("hq4"), codec_of("hq2"), Noisy()]
    found = measure_window(loaded.model, "w", IDS[:161], (128,), 32, codecs)
    int8, hq4, hq2, noisy = (found[codec.name][0] for codec in codecs)
    assert 0 < int8.mse_max < hq4.mse_max < hq2.mse_max and 0 < int8.rel_l2_max < hq4.rel_l2_max < hq2.rel_l2_max
    assert int8.strict and not noisy.strict and noisy.rel_l2_max > 0.1
    layout = codec_of("hq4").fmt.layout(16)
    assert (hq4.stored_bits, hq4.effective_bits) == (layout.stored_bits_per_value(128), layout.effective_bits_per_dim(128))


def test_a_nan_of_the_codec_is_a_measured_failure(loaded):
    (trials,) = measure_window(loaded.model, "w", IDS[:97], (64,), 32, [Noisy(float("nan"))]).values()
    assert trials[0].mse_max == trials[0].rel_l2_max == float("inf") and not trials[0].strict


def test_a_nan_of_the_model_is_an_error(loaded):
    broken = copy.deepcopy(loaded.model)
    broken.lm_head.weight.data[0] = float("nan")
    with pytest.raises(GateError, match="model's own logits are not finite"):
        measure_window(broken, "w", IDS[:97], (64,), 32, [codec_of("bf16")])


def test_a_chunk_of_steps_equals_decoding_token_by_token(loaded):
    tokens = torch.tensor([IDS[:160]])
    cache = HQCache("hq4")
    with torch.inference_mode():
        loaded.model(input_ids=tokens[:, :128], past_key_values=cache)
        cache.pack()
        single = copy.deepcopy(cache)
        chunk = loaded.model(input_ids=tokens[:, 128:], past_key_values=cache).logits[0]
        steps = [loaded.model(input_ids=tokens[:, i : i + 1], past_key_values=single).logits[0, 0] for i in range(128, 160)]
    # float32 rounding, and where it falls on the border of two bfloat16 numbers one of K and V moves by 2**-8 of itself:
    # one such value among 160 keys changes a logit of size 3 by less than 3 * 2**-8 / 10.
    assert (chunk - torch.stack(steps)).abs().max() < 1.2e-3
    assert cache.packed_tokens == single.packed_tokens == 128


def test_layer_local_error_uses_the_dense_arms_queries(loaded):
    """Against the definition, with plain attention: layer 1's query is the dense arm's although layer 0 has erred."""
    model, tokens, kept = loaded.model, torch.tensor([IDS[:80]]), {}
    dense, packed = HQCache("bf16"), HQCache("hq2")
    with torch.inference_mode():
        for cache in (dense, packed):
            model(input_ids=tokens[:, :64], past_key_values=cache)
        packed.pack()
        unpacked = [layer._unpack() for layer in packed.layers]
        with AttentionProbe(model) as probe:
            with probe.dense_arm():
                model(input_ids=tokens[:, 64:], past_key_values=dense)
            kept = dict(probe._dense)
            with probe.packed_arm():
                model(input_ids=tokens[:, 64:], past_key_values=packed)
            found = probe.relative_l2()
        expected = []
        mask = torch.ones(16, 80, dtype=torch.bool).tril(64)
        for index, layer in enumerate(dense.layers):
            outputs = []
            for k_prefix, v_prefix in ((layer.keys[:, :, :64], layer.values[:, :, :64]), unpacked[index]):
                k = torch.cat([k_prefix.float(), layer.keys[:, :, 64:].float()], 2).repeat_interleave(2, 1)
                v = torch.cat([v_prefix.float(), layer.values[:, :, 64:].float()], 2).repeat_interleave(2, 1)
                out = functional.scaled_dot_product_attention(kept[index].query, k, v, attn_mask=mask)
                outputs.append(out.transpose(1, 2).flatten(2)[0] @ model.model.layers[index].self_attn.o_proj.weight.T)
            expected.append((outputs[1] - outputs[0]).norm(dim=-1) / outputs[0].norm(dim=-1))
    torch.testing.assert_close(found, torch.stack(expected).quantile(0.5, dim=0), rtol=1e-4, atol=1e-6)
    assert found.min() > 0.01


def test_the_models_own_attention_comes_back(loaded):
    before = loaded.model.config._attn_implementation
    measure_window(loaded.model, "w", IDS[:97], (64,), 8, [codec_of("int8")])
    assert loaded.model.config._attn_implementation == before != "sgl_hq_gate"


def test_progress_adds_up(loaded):
    costs = []
    measure_window(loaded.model, "w", IDS[:137], (64, 128), 8, [codec_of("int8"), codec_of("hq4")], costs.append)
    assert sum(costs) == window_cost(prefixes=2, codecs=2)


@pytest.mark.parametrize("prefixes", [(100,), (0,), (-64,), (64, 64), ()])
def test_prefixes_that_are_no_pages(prefixes):
    with pytest.raises(GateError, match="multiples of 64"):
        check_sizes(prefixes, 32)


def test_no_step_is_refused():
    with pytest.raises(GateError, match="--steps 0"):
        check_sizes((64,), 0)


def test_too_short_a_text_or_context(loaded):
    with pytest.raises(GateError, match="window mine has 11 tokens.* need 97: give a longer text or a shorter --prefix"):
        measure(loaded, [Window("mine", "text", "hello world")], (64,), 32, [codec_of("int8")])
    with pytest.raises(GateError, match="context is 4096 tokens"):
        measure(loaded, [Window("mine", "text", "hello " * 1000)], (4096,), 32, [codec_of("int8")])


def test_unknown_formats_and_models(tmp_path):
    with pytest.raises(GateError, match="unknown page format 'hq66'.*Reference formats: int4_sym_g32"):
        codec_of("hq66")
    with pytest.raises(GateError, match="cannot load a model from"):
        load_model(str(tmp_path))
    assert lossy_presets() == ["int8", "hq7", "hq6", "hq5", "hq4", "hq3", "hq2"]


def test_windows(tmp_path):
    windows = shipped_windows()
    assert len(windows) == 13 and not set(CORE) & set(HOLD_OUT)
    assert 100_000 < sum(len(w.text.encode()) for w in windows) < 160_000
    with pytest.raises(GateError, match="cannot read window"):
        windows_of_files([tmp_path / "none.txt"])
    (tmp_path / "a.txt").write_text("text")
    assert windows_of_files([tmp_path / "a.txt"]) == (Window("a.txt", "text", "text"),)
