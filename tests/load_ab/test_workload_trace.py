"""`trace`: a slice of the real conversation trace, replayed with its own sharing, arrivals and lengths."""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path

import pytest
from load_ab.word_tokenizer import WordTokenizer

from sgl_hq.launch.load_ab.workload_trace import Trace, request_sets
from sgl_hq.launch.workload import WorkloadError

SLICE = Path(__file__).parent / "data" / "mooncake-slice.jsonl"
LINES = [json.loads(line) for line in SLICE.read_text().splitlines()]


def spec(**options) -> Trace:
    return Trace(**{"name": "t", "kind": "trace", "trace": SLICE, "requests": len(LINES)} | options)


def hits_of_the_trace(lines: list[dict]) -> list[int]:
    """Leading blocks of each request that an earlier one had, from the hash ids alone."""
    seen: set[int] = set()
    hits = []
    for line in lines:
        hits.append(sum(1 for _ in takewhile(seen.__contains__, line["hash_ids"])))
        seen.update(line["hash_ids"])
    return hits


@pytest.mark.parametrize("block", [512, 64, 192])
def test_an_infinite_cache_hits_what_the_trace_hits(block):
    (replay,) = request_sets(spec(block_tokens=block), WordTokenizer(), seed=1)
    hits = hits_of_the_trace(LINES)
    assert sum(hits) > len(LINES)  # the slice shares more than its first block
    # Whole pages, and never the last token: a request whose blocks are all known computes its last page.
    expected = [min(hit * block, (len(r.prompt) - 1) // 64 * 64) for hit, r in zip(hits, replay.requests)]
    assert replay.ideal_cached_tokens == sum(expected)


def test_equal_ids_are_equal_tokens_and_others_differ():
    (replay,) = request_sets(spec(), WordTokenizer(), seed=1)
    tokens_of: dict[int, tuple[int, ...]] = {}
    for line, request in zip(LINES, replay.requests):
        for position, block in enumerate(line["hash_ids"]):
            tokens = request.prompt[512 * position : 512 * (position + 1)]
            assert tokens_of.setdefault(block, tokens) == tokens
    beginnings = {tokens[:2] for tokens in tokens_of.values() if len(tokens) > 1}
    assert len(beginnings) == sum(len(tokens) > 1 for tokens in tokens_of.values()) > 400


def test_lengths_and_arrivals_are_the_traces():
    (replay,) = request_sets(spec(time_scale=0.5), WordTokenizer(), seed=1)
    assert [(len(r.prompt), r.output) for r in replay.requests] == [(x["input_length"], x["output_length"]) for x in LINES]
    assert [r.at_s for r in replay.requests] == [(x["timestamp"] - LINES[0]["timestamp"]) / 1000 / 2 for x in LINES]
    assert replay.requests[0].at_s == 0 and replay.requests[-1].at_s == 4.5005


def test_lengths_shrink_with_the_blocks():
    (replay,) = request_sets(spec(block_tokens=64), WordTokenizer(), seed=1)
    for line, request in zip(LINES, replay.requests):
        assert abs(len(request.prompt) - line["input_length"] / 8) <= 1
        assert abs(request.output - line["output_length"] / 8) <= 1 and request.output >= 1


def test_longer_ones_are_dropped_and_counted():
    fits = [x for x in LINES if x["input_length"] + x["output_length"] <= 5000]
    (replay,) = request_sets(spec(max_context=5000, requests=4), WordTokenizer(), seed=1)
    assert [len(r.prompt) for r in replay.requests] == [x["input_length"] for x in fits[:4]]
    dropped = LINES.index(fits[3]) - 3
    assert f"the first 4 requests of mooncake-slice.jsonl of at most 5000 tokens ({dropped} longer ones dropped)" in replay.about
    with pytest.raises(WorkloadError, match=f"has {len(fits)} requests that fit, not 29: lower requests or raise max_context"):
        request_sets(spec(max_context=5000), WordTokenizer(), seed=1)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"input_length": 1025}, r"\(2 hash ids for 1025 tokens"),
        ({"input_length": 512}, r"\(2 hash ids for 512 tokens"),
        ({"input_length": 0}, "greater than or equal to 1"),
        ({"timestamp": None}, "valid number"),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path, change, reason):
    good = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}
    (tmp_path / "t.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n")
    with pytest.raises(WorkloadError, match=f"line 2, is no request of a Mooncake trace .*{reason}"):
        request_sets(spec(trace=tmp_path / "t.jsonl", requests=2), WordTokenizer(), seed=1)


def test_a_trace_that_is_not_there():
    with pytest.raises(WorkloadError, match="the trace nowhere.jsonl cannot be read"):
        request_sets(spec(trace=Path("nowhere.jsonl")), WordTokenizer(), seed=1)


@pytest.mark.parametrize("block", [0, 32, 100, 576])
def test_blocks_are_whole_pages(block):
    with pytest.raises(ValueError):
        spec(block_tokens=block)
