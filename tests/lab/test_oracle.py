"""Selectors in a real forward: keeping everything is dense, a step is a step, the reference must be finite."""

from __future__ import annotations

import copy

import pytest
import torch

from sgl_hq.gate.run import GateModel, load_model
from sgl_hq.hq_cache import HQCache
from sgl_hq.lab.errors import LabError
from sgl_hq.lab.oracle import measure_text, text_cost
from sgl_hq.lab.oracle_rows import summarize_selector
from sgl_hq.lab.selected_attention import SelectedAttention
from sgl_hq.lab.selectors import parse_selectors

CONTEXT, STEPS = 150, 9
IDS = torch.randint(0, 256, (CONTEXT + STEPS + 1,), generator=torch.Generator().manual_seed(3)).tolist()
EVERYTHING = "global_block_mass:f=1:b=16,recent_sink:sink=0:recent=1000,quest:f=1:b=16"
SOME = "global_block_mass:f=0.25:b=16,recent_sink:sink=2:recent=20,quest:f=0.25:b=16"


def rows_of(loaded: GateModel, names: str, **more):
    return measure_text(loaded.model, "text", IDS, CONTEXT, parse_selectors(names), **more)


def prefilled(model) -> HQCache:
    cache = HQCache("bf16")
    model(input_ids=torch.tensor([IDS[:CONTEXT]]), past_key_values=cache)
    return cache


def test_keeping_everything_is_the_dense_arm_to_the_last_bit(loaded):
    rows = rows_of(loaded, EVERYTHING)
    assert len(rows) == 3 * STEPS
    assert {(r.mse, r.rel_l2, r.kl, r.topk, r.argmax_equal, r.kept_fraction) for r in rows} == {(0.0, 0.0, 0.0, 1.0, True, 1.0)}
    assert {r.read_fraction for r in rows if r.selector.startswith("quest")} == {1 + 1 / 16}


def test_fractions_are_counted_and_cost_adds_up(loaded):
    costs = []
    rows = rows_of(loaded, SOME, advance=costs.append)
    assert sum(costs) == text_cost(3)
    by_name = {name: [r for r in rows if r.selector.startswith(name)] for name in ("global", "recent", "quest")}
    assert all(r.mse > 0 and r.rel_l2 > 0 for r in rows)
    for row in by_name["recent"]:
        assert row.kept_fraction == row.read_fraction == pytest.approx(22 / (row.context_tokens + 1))
    for row in by_name["global"]:  # at most 3 of 10 blocks, the newest of which is not full
        assert row.kept_fraction == row.read_fraction <= 48 / (row.context_tokens + 1) + 1e-6
    for row in by_name["quest"]:  # the two query heads of a kv head choose for themselves: more is read than attended to
        assert row.kept_fraction + 1 / 16 < row.read_fraction <= 2 * row.kept_fraction + 1 / 16


@torch.inference_mode()
def test_a_chunk_is_its_steps_one_by_one(loaded):
    attention, chunk = SelectedAttention(loaded.model), torch.tensor([IDS[CONTEXT:-1]])
    for selector in parse_selectors(SOME):
        prefix = prefilled(loaded.model)
        with attention.selecting(selector):
            together = loaded.model(input_ids=chunk, past_key_values=copy.deepcopy(prefix)).logits[0]
        kept, single = attention.kept_fraction(), []
        for step in range(STEPS):
            with attention.selecting(selector):
                single.append(loaded.model(input_ids=chunk[:, step : step + 1], past_key_values=prefix).logits[0, 0])
            assert torch.allclose(attention.kept_fraction(), kept[step])
        torch.testing.assert_close(torch.stack(single), together, rtol=0, atol=1e-4)  # float32 sums in another order


@torch.inference_mode()
def test_recent_sink_is_a_mask_that_transformers_can_be_given(loaded):
    """An independent way: the model's own attention with a mask from outside."""
    (selector,) = parse_selectors("recent_sink:sink=2:recent=20")
    chunk = torch.tensor([IDS[CONTEXT:-1]])
    mask = torch.full((1, 1, STEPS, CONTEXT + STEPS), torch.finfo(torch.float32).min)
    for step in range(STEPS):
        for token in range(CONTEXT + step + 1):
            if token < 2 or CONTEXT + step - token < 20:
                mask[0, 0, step, token] = 0
    expected = loaded.model(input_ids=chunk, past_key_values=prefilled(loaded.model), attention_mask=mask).logits[0]
    prefix = prefilled(loaded.model)
    with SelectedAttention(loaded.model).selecting(selector):
        found = loaded.model(input_ids=chunk, past_key_values=prefix).logits[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_layer_local_error_comes_from_the_dense_input(loaded):
    """In the first layer both arms have the same input, so the local error is that of the layer's own outputs; the second
    layer's local error is computed without the first one's."""
    (selector,) = parse_selectors("recent_sink:sink=2:recent=20")
    chunk, outputs = torch.tensor([IDS[CONTEXT:-1]]), []
    prefixes = [prefilled(loaded.model) for _ in range(2)]
    first = loaded.model.model.layers[0].self_attn
    hook = first.register_forward_hook(lambda module, args, output: outputs.append(output[0][0]))
    attention = SelectedAttention(loaded.model)
    try:
        with attention.watching([selector]):
            loaded.model(input_ids=chunk, past_key_values=prefixes[0])
        with attention.selecting(selector):
            loaded.model(input_ids=chunk, past_key_values=prefixes[1])
    finally:
        hook.remove()
    dense, selected = outputs
    expected = (selected - dense).norm(dim=-1) / dense.norm(dim=-1)
    local = attention._errors[selector.name]
    torch.testing.assert_close(local[0], expected, rtol=1e-4, atol=0)
    assert len(local) == 2
    assert torch.equal(attention.relative_l2(selector), torch.stack(local).quantile(0.5, dim=0))


def test_a_dense_reference_that_is_not_finite_at_one_step_is_refused(tiny_model):
    broken = load_model(str(tiny_model))
    calls = []

    def spoil(module, args, output):
        calls.append(output)
        if len(calls) == 2:  # the prefill came first
            output[0, 5, 17] = torch.nan
        return output

    broken.model.lm_head.register_forward_hook(spoil)
    with pytest.raises(LabError, match="not finite at step 5 of text text"):
        rows_of(broken, EVERYTHING)


def test_a_selected_arm_that_is_not_finite_fails_its_step_only(tiny_model):
    broken = load_model(str(tiny_model))
    calls = []

    def spoil(module, args, output):
        calls.append(output)
        if len(calls) == 3:
            output[0, 5] = torch.nan
        return output

    broken.model.lm_head.register_forward_hook(spoil)
    rows = rows_of(broken, "global_block_mass:f=1:b=16")
    assert [row.step for row in rows if not row.keeps_bounds] == [5]
    found = summarize_selector(rows)
    assert (found["implementation_verdict"], found["rows_within_bounds"], found["mse_max"]) == ("fail", STEPS - 1, float("inf"))


def test_attention_that_cannot_be_changed_is_refused(loaded, monkeypatch):
    from contextlib import nullcontext

    monkeypatch.setattr("sgl_hq.lab.selected_attention.attention_through", lambda *_: nullcontext())
    with pytest.raises(LabError, match="0 of 2 layers"):
        rows_of(loaded, EVERYTHING)
    assert loaded.model.config._attn_implementation == "sdpa"
