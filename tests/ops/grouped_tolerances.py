"""How far the grouped kernels may be from float64 attention over the unpacked pages, from their roundings and the data.

The kernels see scores s_t + e_t, weights rounded by w_t, values v_t + x_t. With softmax weights p_t of the exact scores and o
their output, e_t alone gives exactly

    o' - o = sum p_t (exp(e_t) - 1) (v_t - o) / sum p_t exp(e_t)          (sum p_t (v_t - o) is 0)
    lse' - lse = log sum p_t exp(e_t)

so |o'- o| <= sum p_t expm1(|e_t|) |v_t - o| / sum p_t exp(-|e_t|), and |lse' - lse| <= max |e_t|. Rounded weights multiply what
the tensor core multiplies, m_t: sum p_t w |m_t| more; values: sum p_t |x_t| more. |.| is the L2 norm over head_dim, which
rotating V leaves alone. Bounds are worst cases: errors that all add up.

Unit roundoffs, half the distance between neighbours: float16 2**-11, bfloat16 2**-8; float32 sums 2**-23 a term, since tensor
cores cut off where IEEE rounds.

| pages read by | e_t / scale | w | m_t | x_t |
|---|---|---|---|---|
| small tiles, bf16, lossless | - | 2**-8 | v_t | - |
| small tiles, int8 | - (q is exact) | 2**-11 | v_t + 128 scale_t | - |
| small tiles, affine | 2**-9 sum |q_c| (k_tc - min_c): step, step * code, their sum with the base, times q | 2**-11 | H v_t - min_t | - |
| large tiles | 2**-8 sum |q_c k_tc|, lossy formats | 2**-8 | v_t | 2**-8 |v_t|, lossy formats |

Float32, all tiles: a score is a sum of head_dim + 16 terms of at most 4 max|k| |q_c| (minimum and codes, or 128 scale and codes,
partly cancel; an escape of a lossless page is 2**-14 of that maximum, so its difference is less than a term), and
2**-20 for exponentials, logarithms and the factors of parts. A sum over T tokens is one of 64, the longest product, and of
T / 16 products; each of p v, p m and p. Merge: the two bfloat16 of a rotated row hold 2**-17 of it, and its product with
the sign matrix sums head_dim terms of at most |o|.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sgl_hq.kernels.page_codec import PageCodec
from sgl_hq.kernels.page_codec.affine import stored_groups
from sgl_hq.kernels.page_codec.hadamard import block_size, sign_matrix
from sgl_hq.page_format import PAGE_TOKENS

F16, BF16, SUM = 2.0**-11, 2.0**-8, 2.0**-23
FLIPPED = 2.0**-10  # V in its rotated space comes from another float32 formula: a value in 2**16 / 64 rounds to the other neighbour


class Reader(enum.Enum):
    SMALL = enum.auto()
    LARGE = enum.auto()


@dataclass
class Tolerance:
    """Of o (L2 norm) and of the natural log-sum-exp, `[rows, q_heads] float64`."""

    o: torch.Tensor
    lse: torch.Tensor


@dataclass
class Tokens:
    """What a group reads, float64: k, v `[kv_heads, T, D]`, and per token what its errors are proportional to."""

    k: torch.Tensor
    v: torch.Tensor
    score_per_q: torch.Tensor  # [kv_heads, T, D]: e_t is at most scale * sum |q_c| of this
    weight: torch.Tensor  # [kv_heads, T]: w |m_t| + |x_t|
    size: torch.Tensor  # [kv_heads, T]: |v_t| + |m_t|, what float32 sums round


def read_error(codec: PageCodec, records: torch.Tensor, sink: torch.Tensor | None, reader: Reader, rounded_pages: bool) -> Tokens:
    """records `[P, kv_heads, record_bytes]` of a group in order. rounded_pages: see grouped_checks.Case.expected."""
    k, v = (side.double() for side in codec.unpack(records, sink))
    fmt, matrix = codec.fmt, _rotation(codec, records.device)
    k_error, k_most = torch.zeros_like(k), k.abs().amax(1, keepdim=True)
    by_weight, x = v, torch.zeros_like(v[..., 0])
    weight = BF16
    if reader is Reader.LARGE and fmt.lossy:
        if rounded_pages:
            x = FLIPPED * BF16 * v.norm(dim=-1)
            k, v = k.float().bfloat16().double(), (v @ matrix).float().bfloat16().double() @ matrix
        else:
            k_error, x = BF16 * k.abs(), BF16 * v.norm(dim=-1)
    elif reader is Reader.SMALL and fmt.kind == "int8":
        field = codec.layout["v_scale"]
        scale = records[..., field.offset : field.end].view(torch.bfloat16).transpose(0, 1).flatten(1).double()
        weight, by_weight = F16, v + 128 * scale[..., None]
    elif reader is Reader.SMALL and fmt.kind == "affine":
        k_min, v_min = (stored_groups(codec.layout, records.transpose(0, 1), side).decode()[1].double() for side in "kv")
        k_error = 4 * F16 * (k - k_min.repeat_interleave(PAGE_TOKENS, 1)).abs()
        weight, by_weight = F16, v @ matrix - v_min.flatten(1)[..., None]
    if sink is not None:  # read by the merge, in float32, as they are
        exact = codec.unpack(records, sink)
        for side, of_sink in zip((k, v), exact, strict=True):
            side[:, : fmt.sink_tokens] = of_sink[:, : fmt.sink_tokens].double()
        k_error[:, : fmt.sink_tokens], x[:, : fmt.sink_tokens] = 0, 0
        by_weight = by_weight.clone()
        by_weight[:, : fmt.sink_tokens] = 0
    of_weight = by_weight.norm(dim=-1)
    rounded = SUM * (k.shape[2] + 16) * 4 * k_most
    return Tokens(k, v, k_error + rounded, weight * of_weight + x, v.norm(dim=-1) + of_weight)


def merged_error(
    q: torch.Tensor, reads: list[tuple[Sequence[int], Tokens]], dense: tuple[torch.Tensor, torch.Tensor] | None, scale: float,
    kv_heads: int,
) -> tuple[torch.Tensor, torch.Tensor, Tolerance]:
    """Attention of all rows over the tokens of their groups and the dense state (o, natural lse), and its tolerance."""
    rows, q_heads, dim = q.shape
    q = q.double().unflatten(1, (kv_heads, -1)).permute(1, 0, 2, 3)  # [kv_heads, rows, group, D]
    o = torch.zeros_like(q)
    lse = torch.full_like(q[..., 0], -torch.inf)
    states = []
    if dense is not None:
        state = [x.unflatten(1, (kv_heads, -1)).transpose(0, 1) for x in dense]
        state[0] = torch.where(state[1][..., None] > -torch.inf, state[0], 0.0)
        states.append((slice(None), *state))
    for group_rows, tokens in reads:
        scores = _product(q[:, list(group_rows)], tokens.k) * scale
        states.append((list(group_rows), _product(scores.softmax(-1), tokens.v.mT), scores.logsumexp(-1)))
    for where, part_o, part_lse in states:
        joined = torch.logaddexp(lse[:, where], part_lse)
        share = [torch.where(joined > -torch.inf, torch.exp(x - joined), 0.0)[..., None] for x in (lse[:, where], part_lse)]
        o[:, where] = o[:, where] * share[0] + part_o * share[1]
        lse[:, where] = joined

    moved, norm, values, worst = (torch.zeros_like(lse) for _ in range(4))  # the sums of the docstring over all tokens
    length = torch.full_like(lse, 64.0)
    for group_rows, tokens in reads:
        where = list(group_rows)
        own_q, own_o = q[:, where], o[:, where]
        p = torch.exp(_product(own_q, tokens.k) * scale - lse[:, where, :, None])
        e = _product(own_q.abs(), tokens.score_per_q) * scale + 2.0**-20
        v_norm, o_norm = tokens.v.norm(dim=-1)[:, None, None, :], own_o.norm(dim=-1, keepdim=True)
        away = (v_norm**2 - 2 * _product(own_o, tokens.v) + o_norm**2).clamp(min=0).sqrt()
        moved[:, where] += (p * torch.expm1(e) * away).sum(-1)
        values[:, where] += (p * torch.exp(e) * tokens.weight[:, None, None, :]).sum(-1)
        norm[:, where] += (p * tokens.size[:, None, None, :]).sum(-1)
        worst[:, where] = torch.maximum(worst[:, where], e.amax(-1))
        length[:, where] += tokens.k.shape[1] / 16
    if dense is not None:
        p = torch.exp(states[0][2] - lse).nan_to_num(0.0)
        e = torch.where(p > 0, SUM * (lse.abs() + 16) + 2.0**-20, 0.0)
        moved += p * torch.expm1(e) * (states[0][1] - o).norm(dim=-1)
        norm += p * states[0][1].norm(dim=-1)
        worst = torch.maximum(worst, e)
    sums = SUM * length
    own = o.norm(dim=-1)
    unrotated = (2.0**-17 + SUM * dim**1.5) * norm
    error = (moved + values) / torch.exp(-worst) + 2 * sums * (norm + own) + unrotated

    def by_row(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(0, 1).flatten(1, 2)

    return by_row(o), by_row(lse), Tolerance(by_row(error), by_row(worst + sums))


def _product(rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """`[kv_heads, R, G, D]` by `[kv_heads, T, D]` to `[kv_heads, R, G, T]`."""
    return (rows.flatten(1, 2) @ tokens.mT).unflatten(1, rows.shape[1:3])


def _rotation(codec: PageCodec, device: torch.device) -> torch.Tensor:
    """The orthonormal, symmetric matrix of V's space in the records; the identity where V is not rotated."""
    dim = codec.layout.v_head_dim
    if codec.fmt.kind != "affine":
        return torch.eye(dim, dtype=torch.float64, device=device)
    return sign_matrix(dim, device).double() / block_size(dim) ** 0.5
