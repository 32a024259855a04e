"""Selectors against loops over single tokens, and their names."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sgl_hq.lab.errors import LabError
from sgl_hq.lab.selectors import GlobalBlockMass, Quest, RecentSink, StepQueries, parse_selectors


def steps_of(length: int, steps: int, seed: int, kv_heads: int = 2, group: int = 3, dim: int = 4) -> StepQueries:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(kv_heads * group, steps, dim, generator=generator)
    key = torch.randn(kv_heads, length, dim, generator=generator)
    visible = torch.ones(steps, length, dtype=torch.bool).tril(length - steps)
    return StepQueries(0, query, key, 0.7, visible)


def blocks_kept(scores: list[float], fraction: float) -> set[int]:
    """Of the blocks a step sees: the share `fraction`, rounded up, largest score first, the earlier of equals."""
    ranked = sorted(range(len(scores)), key=lambda block: (-scores[block], block))
    return set(ranked[: math.ceil(fraction * len(scores) - 1e-9)])


def brute_mass(at: StepQueries, f: float, b: int) -> list[list[set[int]]]:
    kept = []
    for step in range(at.query.shape[1]):
        position = at.key.shape[1] - at.query.shape[1] + step
        mass = [0.0] * (position // b + 1)
        for head in range(len(at.query)):
            kv = head // (len(at.query) // len(at.key))
            weights = [math.exp(0.7 * float(at.query[head, step] @ at.key[kv, token])) for token in range(position + 1)]
            for token, weight in enumerate(weights):
                mass[token // b] += weight / sum(weights)
        chosen = blocks_kept(mass, f)
        kept.append({token for token in range(position + 1) if token // b in chosen})
    return [kept]


def brute_quest(at: StepQueries, f: float, b: int, first: int) -> list[list[set[int]]]:
    of_heads = []
    for head in range(len(at.query)):
        key = at.key[head // (len(at.query) // len(at.key))]
        kept = []
        for step in range(at.query.shape[1]):
            position = at.key.shape[1] - at.query.shape[1] + step
            bounds = []
            for page in range(position // b):
                page_keys = key[page * b : (page + 1) * b]
                products = [at.query[head, step] * corner for corner in (page_keys.amin(0), page_keys.amax(0))]
                bounds.append(float(torch.maximum(*products).sum()))
                assert bounds[-1] >= float((page_keys @ at.query[head, step]).max()) - 1e-5  # a bound it is
            chosen = blocks_kept([*(1e38 if page < first else bound for page, bound in enumerate(bounds)), math.inf], f)
            kept.append({token for token in range(position + 1) if token // b in chosen})
        of_heads.append(kept)
    return of_heads


def as_sets(keep: torch.Tensor) -> list[list[set[int]]]:
    return [[set(row.nonzero().flatten().tolist()) for row in head] for head in keep]


SHAPES = st.integers(1, 40).flatmap(lambda length: st.tuples(st.just(length), st.integers(1, min(length, 7))))
FRACTIONS = st.sampled_from([0.01, 0.25, 1 / 3, 0.5, 0.99, 1.0])
BLOCKS = st.sampled_from([1, 3, 4, 16, 64])


@settings(deadline=None)
@given(SHAPES, FRACTIONS, BLOCKS, st.integers(0, 1000))
@example((40, 3), 0.25, 4, 1)  # drawn ones are mostly short: one or two blocks, between which there is nothing to choose
def test_global_block_mass(shape, f, b, seed):
    at = steps_of(*shape, seed)
    assert as_sets(GlobalBlockMass(f, b).keep(at)) == brute_mass(at, f, b)


@settings(deadline=None)
@given(SHAPES, FRACTIONS, BLOCKS, st.integers(0, 1000), st.integers(0, 2))
@example((40, 3), 0.25, 4, 1, 0)
@example((40, 3), 0.25, 4, 1, 1)
def test_quest(shape, f, b, seed, first):
    at = steps_of(*shape, seed)
    assert as_sets(Quest(f, b, first=first).keep(at)) == brute_quest(at, f, b, first)


@settings(deadline=None)
@given(SHAPES, st.integers(0, 50), st.integers(1, 50))
def test_recent_sink(shape, sink, recent):
    at = steps_of(*shape, 0)
    first = shape[0] - shape[1]
    expected = [{t for t in range(p + 1) if t < sink or p - t < recent} for p in range(first, shape[0])]
    assert as_sets(RecentSink(sink, recent).keep(at)) == [expected]


@settings(deadline=None)
@given(SHAPES, BLOCKS)
def test_everything_is_kept_at_f_1(shape, b):
    at = steps_of(*shape, 0)
    for selector in (GlobalBlockMass(1.0, b), Quest(1.0, b), RecentSink(0, shape[0])):
        assert torch.equal(selector.keep(at), at.visible.expand_as(selector.keep(at)))


def test_quest_leaves_its_first_layers_dense():
    at, selector = steps_of(40, 3, 0), Quest(0.25, 4, dense=2)
    by_layer = [selector.keep(replace(at, layer=layer)) for layer in range(3)]
    assert all(torch.equal(keep, at.visible[None]) for keep in by_layer[:2])
    assert [selector.index_fraction(layer) for layer in range(3)] == [0, 0, 1 / 4]
    assert torch.equal(by_layer[2], Quest(0.25, 4).keep(at)) and not torch.equal(by_layer[2], by_layer[0].expand_as(by_layer[2]))


def test_the_oracle_keeps_the_mass_where_it_is():
    """One key far ahead of the others for every head: its block alone holds nearly all of the mass."""
    at = steps_of(32, 1, 0)
    at.key[:] = 0
    at.query[:] = 1
    at.key[:, 21] = 5
    assert as_sets(GlobalBlockMass(0.01, 4).keep(at)) == [[{20, 21, 22, 23}]]


def test_names_are_read_back():
    text = "global_block_mass:f=0.25:b=64,recent_sink:sink=4:recent=1024,quest:f=0.5:b=16,quest:f=0.5:b=16:dense=2:first=1"
    parsed = parse_selectors(text)
    assert ",".join(selector.name for selector in parsed) == text
    assert parse_selectors(f"{text}, {text}") == parsed  # each is measured once
    assert [selector.oracle for selector in parsed] == [True, False, False, False]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no selector is given"),
        ("h2o:f=0.5", "there is no selector h2o"),
        ("quest", "needs the parameters f, b"),
        ("quest:f=0.5", "needs the parameters f, b"),
        ("quest:f=0.5:b=4:b=4", "needs the parameters f, b"),
        ("quest:f=0.5:b=4:g=1", "needs the parameters f, b"),
        ("recent_sink:sink=4", "needs the parameters sink, recent"),
        ("quest:f=0.5:b=4:dense=-1", "dense=-1 in selector"),
        ("quest:f=0:b=4", "f=0 in selector"),
        ("quest:f=1.5:b=4", "f=1.5 in selector"),
        ("quest:f=nan:b=4", "f=nan in selector"),
        ("quest:f=0.5:b=0", "b=0 in selector"),
        ("recent_sink:sink=-1:recent=4", "sink=-1 in selector"),
        ("recent_sink:sink=0:recent=0", "recent=0 in selector"),
        ("recent_sink:sink=0:recent=4.5", "recent=4.5 in selector"),
    ],
)
def test_wrong_names_are_refused_with_the_grammar(text, reason):
    with pytest.raises(LabError, match=reason) as error:
        parse_selectors(text)
    assert "quest:f=F:b=TOKENS" in str(error.value)
