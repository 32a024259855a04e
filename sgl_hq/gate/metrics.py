"""How far the packed arm is from the dense arm: logits here, attention output in `attention_probe.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sgl_hq.gate.bounds import NOISE_FLOOR, TOP_K


@dataclass(frozen=True)
class StepFigures:
    """One value per step `[S]`, float64 (counts int64, flags bool)."""

    mse: torch.Tensor  # mean over the vocabulary of the squared logit difference
    variance_mse: torch.Tensor  # the same after removing the mean difference, which softmax cannot see
    topk_common: torch.Tensor  # tokens that both top-TOP_K sets hold, 0..TOP_K
    argmax_equal: torch.Tensor
    argmax_judged: torch.Tensor  # the dense arm's margin exceeds the noise floor
    kl: torch.Tensor  # KL(dense || packed), nats
    nll_dense: torch.Tensor  # of the text's own next token, nats
    nll_packed: torch.Tensor


def compare_logits(dense: torch.Tensor, packed: torch.Tensor, next_tokens: torch.Tensor) -> StepFigures:
    """dense, packed: `[S, vocabulary] float`; next_tokens: `[S] int64`, the text's own.

    Where the packed logits are not finite, mse, variance_mse, kl and nll_packed are infinite, so that every bound and
    mean shows it.
    """
    dense, packed = dense.double(), packed.double()
    error = packed - dense
    best = dense.topk(2).values
    dense_log, packed_log = dense.log_softmax(-1), packed.log_softmax(-1)
    tops = [side.topk(TOP_K).indices for side in (dense, packed)]
    rows = torch.arange(len(next_tokens), device=dense.device)
    finite = packed.isfinite().all(-1)

    def or_infinite(values: torch.Tensor) -> torch.Tensor:
        return torch.where(finite, values, torch.inf)

    return StepFigures(
        mse=or_infinite(error.square().mean(-1)),
        variance_mse=or_infinite((error - error.mean(-1, keepdim=True)).square().mean(-1)),
        topk_common=(tops[0].unsqueeze(-1) == tops[1].unsqueeze(-2)).sum((-1, -2)),
        argmax_equal=tops[0][:, 0] == tops[1][:, 0],
        argmax_judged=best[:, 0] - best[:, 1] > NOISE_FLOOR,
        kl=or_infinite((dense_log.exp() * (dense_log - packed_log)).sum(-1)),
        nll_dense=-dense_log[rows, next_tokens],
        nll_packed=or_infinite(-packed_log[rows, next_tokens]),
    )
