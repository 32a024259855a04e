"""Figures against a computation token by token in Python, and the rules that turn them into a verdict."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sgl_hq.gate.bounds import BOUNDS, NOISE_FLOOR
from sgl_hq.gate.figures import failing_bounds, summarize
from sgl_hq.gate.metrics import compare_logits

from .conftest import TRIAL


def naive(dense: list[float], packed: list[float], token: int) -> dict[str, float]:
    """One step, vocabulary entry by vocabulary entry."""
    n = len(dense)
    error = [p - d for d, p in zip(dense, packed)]
    shift = sum(error) / n

    def log_softmax(row):
        top = max(row)
        log_sum = top + math.log(sum(math.exp(x - top) for x in row))
        return [x - log_sum for x in row]

    def order(row):
        return sorted(range(n), key=lambda i: -row[i])

    log_d, log_p, best = log_softmax(dense), log_softmax(packed), order(dense)
    return {
        "mse": sum(e * e for e in error) / n,
        "variance_mse": sum((e - shift) ** 2 for e in error) / n,
        "topk_common": len(set(best[:10]) & set(order(packed)[:10])),
        "argmax_equal": best[0] == order(packed)[0],
        "argmax_judged": dense[best[0]] - dense[best[1]] > NOISE_FLOOR,
        "kl": sum(math.exp(d) * (d - p) for d, p in zip(log_d, log_p)),
        "nll_dense": -log_d[token],
        "nll_packed": -log_p[token],
    }


def test_figures_equal_the_naive_ones():
    torch.manual_seed(1)
    dense = torch.randn(12, 97) * 4 + 20
    dense[3, 5] = dense[3].max() + NOISE_FLOOR / 2  # within the noise floor: not judged
    packed = dense + torch.randn(12, 97) * torch.linspace(0, 2, 12).unsqueeze(1) - 0.5
    following = torch.randint(0, 97, (12,))
    found = compare_logits(dense, packed, following)
    for step in range(12):
        for name, expected in naive(dense[step].tolist(), packed[step].tolist(), int(following[step])).items():
            # float64 sums of 97 terms of size below 1e3: 97 * 2**-53 * 1e3 is 1e-11
            assert float(getattr(found, name)[step]) == pytest.approx(float(expected), abs=1e-9), (name, step)
    assert not found.argmax_judged[3] and found.argmax_judged.any()


def test_equal_logits_give_zero_and_a_common_shift_only_raw_error():
    dense = torch.randn(4, 50) + 20
    same = compare_logits(dense, dense, torch.zeros(4, dtype=torch.long))
    assert same.mse.max() == same.kl.abs().max() == 0 and bool(same.argmax_equal.all()) and same.topk_common.min() == 10
    shifted = compare_logits(dense, dense + 2, torch.zeros(4, dtype=torch.long))
    assert shifted.mse.min() == pytest.approx(4, rel=1e-5) and shifted.variance_mse.max() < 1e-10 and shifted.kl.max() < 1e-10


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_packed_logits_that_are_not_finite_fail(value):
    dense = torch.randn(2, 50)
    packed = dense.clone()
    packed[1, 7] = value
    found = compare_logits(dense, packed, torch.zeros(2, dtype=torch.long))
    assert found.mse.tolist() == [0.0, math.inf] and found.nll_packed[1] == math.inf
    trial = replace(TRIAL, mse_max=float(found.mse.max()))
    assert not trial.strict and "logit MSE inf" in failing_bounds(summarize([trial]))[0]


BROKEN = [
    ({"mse_max": 0.2501}, "logit MSE"),
    ({"topk_min": 0.7}, "top-10 overlap"),
    ({"argmax_equal": 29 / 30}, "equal next tokens"),
    ({"rel_l2_max": 0.1001}, "relative L2"),
]


def test_a_trial_on_every_bound_passes():
    trial = replace(TRIAL, **{bound.figure: bound.limit for bound in BOUNDS})
    assert trial.strict and summarize([trial])["verdict"] == "pass"


@pytest.mark.parametrize("changed, named", BROKEN, ids=[b[1] for b in BROKEN])
def test_one_broken_bound_in_one_trial_of_a_hundred_fails(changed, named):
    summary = summarize([*[TRIAL] * 99, replace(TRIAL, **changed)])
    assert (summary["verdict"], summary["strict_trials"], summary["trials"]) == ("fail", 99, 100)
    (line,) = failing_bounds(summary)
    assert line.startswith(named) or named in line


def test_means_are_over_steps_and_bits_at_the_quoted_prefix():
    a = replace(TRIAL, prefix_tokens=1024, steps=32, mse_mean=0.1, nll_dense=1.0, nll_packed=1.1, stored_bits=5.0)
    b = replace(TRIAL, prefix_tokens=2048, steps=96, mse_mean=0.5, nll_dense=2.0, nll_packed=2.0, stored_bits=4.0)
    summary = summarize([a, b])
    assert summary["mse_mean"] == pytest.approx(0.4) and summary["steps"] == 128
    assert summary["ppl_change_percent"] == pytest.approx(100 * math.expm1(0.025))
    assert (summary["stored_bits"], summary["bits_at_prefix_tokens"]) == (5.0, 1024)


def test_unjudged_steps_do_not_count_as_different():
    summary = summarize([replace(TRIAL, argmax_judged=0, argmax_equal=1.0, argmax_agreement=0.0)])
    assert summary["argmax_equal"] == 1.0 and summary["verdict"] == "pass"
