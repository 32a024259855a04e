"""Work-reduction selectors: which tokens a decode step attends to. A name states its parameters:

    global_block_mass:f=0.25:b=64     oracle: the share f of the blocks of b tokens with the largest attention mass, summed
                                      over all heads of a layer. Needs the true attention, so it bounds what any selector
                                      of whole blocks per layer could keep
    recent_sink:sink=4:recent=1024    the first and the latest tokens (the step's own token counts as one of the latest)
    quest:f=0.25:b=16                 implementable: the share f of the pages of b tokens with the largest upper bound of
                                      q.k, from the minimum and maximum of K per channel (arXiv 2406.10774); per query head,
                                      and the newest page always. `:dense=2` leaves the first two layers dense, as there;
                                      `:first=1` (ours) always keeps the first page, which holds the attention sink
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from typing import ClassVar, Protocol

import torch
from torch.nn import functional

from sgl_hq.lab.errors import LabError

_GRAMMAR = "global_block_mass:f=F:b=TOKENS, recent_sink:sink=TOKENS:recent=TOKENS or quest:f=F:b=TOKENS[:dense=LAYERS][:first=PAGES]"


@dataclass(frozen=True)
class StepQueries:
    """What one layer's attention sees in a chunk of decode steps.

    layer: its index. query `[Hq, S, D]`, key `[Hkv, L, D]`, both after RoPE; scale of q.k; visible `[S, L] bool`: step s sees the tokens up
    to its own, which is token L - S + s.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    scale: float
    visible: torch.Tensor


class Selector(Protocol):
    oracle: bool  # needs the true attention: a bound on what could be built, and nothing that could

    @property
    def name(self) -> str: ...

    def index_fraction(self, layer: int) -> float:
        """Bytes read to make the selection, as a share of K and V; 0 for an oracle, whose price is not the question."""
        ...

    def keep(self, steps: StepQueries) -> torch.Tensor:
        """`[Hq, S, L] bool`, or `[1, S, L]` if all heads attend to the same tokens; a subset of `visible`, never empty."""
        ...


@dataclass(frozen=True)
class GlobalBlockMass:
    f: float
    b: int
    oracle: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"global_block_mass:f={self.f:g}:b={self.b}"

    def index_fraction(self, layer: int) -> float:
        return 0.0

    def keep(self, steps: StepQueries) -> torch.Tensor:
        heads = len(steps.query) // len(steps.key)
        scores = steps.query @ steps.key.repeat_interleave(heads, 0).mT * steps.scale
        mass = scores.masked_fill(~steps.visible, -math.inf).softmax(-1).sum(0, keepdim=True)
        of_blocks = _blocks(mass, self.b, 0.0).sum(-1)
        return _largest(of_blocks, steps.visible, self.f, self.b)


@dataclass(frozen=True)
class RecentSink:
    sink: int
    recent: int
    oracle: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return f"recent_sink:sink={self.sink}:recent={self.recent}"

    def index_fraction(self, layer: int) -> float:
        return 0.0

    def keep(self, steps: StepQueries) -> torch.Tensor:
        token = torch.arange(steps.visible.shape[1], device=steps.visible.device)
        length = steps.visible.sum(1, keepdim=True)
        return (steps.visible & ((token < self.sink) | (token >= length - self.recent)))[None]


@dataclass(frozen=True)
class Quest:
    f: float
    b: int
    dense: int = 0  # first layers that attend to everything
    first: int = 0  # first pages that are kept before any other but the newest
    oracle: ClassVar[bool] = False

    @property
    def name(self) -> str:
        options = "".join(f":{key}={getattr(self, key)}" for key in ("dense", "first") if getattr(self, key))
        return f"quest:f={self.f:g}:b={self.b}{options}"

    def index_fraction(self, layer: int) -> float:
        """A minimum and a maximum beside the b keys and b values of a page."""
        return 0.0 if layer < self.dense else 1 / self.b

    def keep(self, steps: StepQueries) -> torch.Tensor:
        """Pages before a step's newest one are complete, so the same bounds serve every step of the chunk."""
        if steps.layer < self.dense:
            return steps.visible[None]
        heads = len(steps.query) // len(steps.key)
        lowest, highest = (
            sign * _blocks((sign * steps.key).mT, self.b, -math.inf).amax(-1).repeat_interleave(heads, 0) for sign in (-1, 1)
        )  # [Hq, D, pages]
        bound = steps.query.clamp(min=0) @ highest + steps.query.clamp(max=0) @ lowest
        bound[..., : self.first] = torch.finfo(bound.dtype).max
        newest = (steps.visible.sum(1) - 1) // self.b
        bound[:, torch.arange(len(newest), device=bound.device), newest] = math.inf
        return _largest(bound, steps.visible, self.f, self.b)


_KINDS: dict[str, type[Selector]] = {"global_block_mass": GlobalBlockMass, "recent_sink": RecentSink, "quest": Quest}
_WHOLE = {"b": 1, "recent": 1, "sink": 0, "dense": 0, "first": 0}  # parameter -> its smallest value


def parse_selectors(text: str) -> tuple[Selector, ...]:
    """Comma-separated names. Raises LabError."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise LabError(f"no selector is given: give {_GRAMMAR}")
    return tuple(dict.fromkeys(_parse(name) for name in names))


def _parse(name: str) -> Selector:
    head, *given = name.split(":")
    kind = _KINDS.get(head)
    if kind is None:
        raise LabError(f"there is no selector {head}: give {_GRAMMAR}")
    pairs = dict(part.partition("=")[::2] for part in given)
    known, needed = [f.name for f in fields(kind)], [f.name for f in fields(kind) if f.default is MISSING]
    if len(pairs) != len(given) or not set(needed) <= set(pairs) <= set(known):
        raise LabError(f"selector {name} needs the parameters {', '.join(needed)}, each once: give {_GRAMMAR}")
    return kind(**{key: _number(name, key, value) for key, value in pairs.items()})


def _number(name: str, key: str, text: str) -> float | int:
    try:
        value = int(text) if key in _WHOLE else float(text)
    except ValueError:
        value = math.nan
    if value >= _WHOLE[key] if key in _WHOLE else 0 < value <= 1:
        return value
    wanted = f"a whole number of at least {_WHOLE[key]}" if key in _WHOLE else "a fraction above 0, at most 1"
    raise LabError(f"{key}={text} in selector {name} is not {wanted}: give {_GRAMMAR}")


def _blocks(values: torch.Tensor, size: int, filler: float) -> torch.Tensor:
    """`[..., L]` -> `[..., blocks, size]`; the last block is filled up."""
    missing = -values.shape[-1] % size
    return functional.pad(values, (0, missing), value=filler).unflatten(-1, (-1, size))


def _largest(scores: torch.Tensor, visible: torch.Tensor, fraction: float, size: int) -> torch.Tensor:
    """scores `[H, S, blocks]` -> `[H, S, L] bool`: of the blocks that a step sees, the share `fraction`, rounded up, with
    the largest scores; the earlier one of equals."""
    length = visible.sum(1)
    seen = (length + size - 1) // size
    budget = torch.tensor([max(1, math.ceil(fraction * n - 1e-9)) for n in seen.tolist()], device=scores.device)
    block = torch.arange(scores.shape[-1], device=scores.device)
    order = scores.masked_fill(block >= seen[:, None], -math.inf).argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, (block < budget[:, None]).expand_as(order))
    return chosen.repeat_interleave(size, -1)[..., : visible.shape[1]] & visible
