"""Requests files: what a set refuses to be, what an infinite cache holds, and files that come back as they were written."""

from __future__ import annotations

import hashlib
import json
from array import array
from dataclasses import replace
from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_hq.launch.load_ab.requests_file import (
    InfiniteCache, LoadRequest, RequestsError, RequestSet, phase_sets, read, write
)  # fmt: skip

PAGE = 64
FIRST, SECOND = LoadRequest(tuple(range(100)), 5), LoadRequest(tuple(range(200)), 7, after=0, stop=("\n",), answer="18")


def make(*requests: LoadRequest, context: int | None = None) -> RequestSet:
    return RequestSet("chats", "multiturn", "cold", 1, context, requests, "about", 0)


# --- what a set refuses --------------------------------------------------------------------------------------------------


def test_every_prompt_has_the_length_of_the_label():
    equal = [LoadRequest((i,) * 128, 1) for i in range(3)]
    assert make(*equal, context=128).prompt_tokens == 384
    for length in (127, 129):  # the label never follows what a request happens to have
        with pytest.raises(RequestsError, match=f"Request 3 of workload chats.* {length} tokens where the label says 128"):
            make(*equal, LoadRequest((7,) * length, 1), context=128)


def test_only_a_turn_that_goes_on_may_be_shorter_than_the_label():
    assert make(FIRST, SECOND, context=200).requests == (FIRST, SECOND)
    with pytest.raises(RequestsError, match="Request 0 .* 100 tokens where the label says 200"):
        make(FIRST, replace(SECOND, after=None), context=200)
    with pytest.raises(RequestsError, match="Request 0 .* 100 tokens where the label says 99"):
        make(FIRST, SECOND, context=99)


WRONG = {
    "no requests": ((), "has no requests"),
    "empty prompt": ((FIRST, LoadRequest((), 1)), "Request 1 .* 0 prompt tokens"),
    "no output": ((LoadRequest((1,), 0),), "Request 0 .* asks for 0"),
    "waits for itself": ((replace(FIRST, after=0),), "Request 0 .* waits for request 0"),
    "waits for a later one": ((replace(FIRST, after=1), FIRST), "Request 0 .* waits for request 1"),
    "waits for none": ((FIRST, replace(FIRST, after=-1)), "Request 1 .* waits for request -1"),
    "arrivals backwards": ((replace(FIRST, at_s=2.0), replace(FIRST, at_s=1.5)), "Request 1 .* arrives before request 0"),
    "some without arrival": ((replace(FIRST, at_s=2.0), FIRST), "Request 1 .* arrives before request 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_named(case):
    requests, message = WRONG[case]
    with pytest.raises(RequestsError, match=message):
        make(*requests)


# --- the infinite cache --------------------------------------------------------------------------------------------------


def brute_force(prompts: list[list[int]]) -> list[int]:
    """Longest run that any earlier prompt has in common, in whole pages, without the last token."""
    hits = []
    for index, prompt in enumerate(prompts):
        runs = [sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, other))) for other in prompts[:index]]
        hits.append(min(max(runs, default=0), len(prompt) - 1) // PAGE * PAGE)
    return hits


# Chunks around the page size, so that prompts share runs which end before, at and after the border of a page.
CHUNKS = st.sampled_from([[token] * length for token in (1, 2) for length in (1, 63, 64, 65, 128)])
PROMPTS = st.lists(st.lists(CHUNKS, min_size=1, max_size=5).map(lambda chunks: sum(chunks, [])), min_size=1, max_size=8)


@settings(max_examples=300, deadline=None)
@given(PROMPTS)
def test_cached_tokens_are_those_of_a_search_through_all_prompts(prompts):
    cache = InfiniteCache()
    assert [cache.cached_tokens(prompt) for prompt in prompts] == brute_force(prompts)


@settings(max_examples=50, deadline=None)
@given(PROMPTS)
def test_cached_tokens_are_those_of_sglangs_radix_cache(prompts):
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

    tree, cache = RadixCache.create_simulated(page_size=PAGE), InfiniteCache()
    for prompt in prompts:
        key = RadixKey(array("q", prompt), limit=len(prompt) - 1)  # Req._compute_max_prefix_len
        assert cache.cached_tokens(prompt) == len(tree.match_prefix(MatchPrefixParams(key=key)).device_indices)
        tree.insert(InsertParams(key=RadixKey(array("q", prompt[: len(prompt) // PAGE * PAGE]))))


def test_a_prompt_sent_again_computes_its_last_page():
    cache = InfiniteCache()
    assert [cache.cached_tokens([5] * n) for n in (128, 128, 129, 127)] == [0, 64, 128, 64]


def test_a_later_phase_finds_what_the_earlier_left():
    prefix = (1,) * 128
    cold, warm = phase_sets("w", "shared", 1, 144, "", {
        "cold": [LoadRequest(prefix + (user,) * 16, 1) for user in (2, 3)],
        "warm": [LoadRequest(prefix + (user,) * 16, 1) for user in (4, 5)],
    })  # fmt: skip
    assert (cold.phase, cold.ideal_cached_tokens) == ("cold", 128)
    assert (warm.phase, warm.ideal_cached_tokens) == ("warm", 256)


# --- files ---------------------------------------------------------------------------------------------------------------


def test_a_file_comes_back_as_it_was(tmp_path):
    requests = make(FIRST, SECOND, context=200)
    digest = write(requests, tmp_path / "a.jsonl")
    assert read(tmp_path / "a.jsonl") == requests
    assert digest == hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest() == write(requests, tmp_path / "b.jsonl")
    assert digest != write(make(FIRST, replace(SECOND, output=8), context=200), tmp_path / "c.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "c.jsonl"]


def test_the_first_line_says_what_follows(tmp_path):
    write(make(FIRST, SECOND, context=200), tmp_path / "a.jsonl")
    header, first, second = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert header == {
        "workload": "chats", "kind": "multiturn", "phase": "cold", "seed": 1, "context": 200, "about": "about",
        "ideal_cached_tokens": 0, "requests": 2, "prompt_tokens": 300, "output_tokens": 12,
    }  # fmt: skip
    assert first["prompt"] == list(range(100)) and (second["after"], second["stop"], second["answer"]) == (0, ["\n"], "18")


DAMAGE = {
    "cut off": lambda lines: lines[:-1],
    "a request twice": lambda lines: [*lines, lines[-1]],
    "cut in a line": lambda lines: [*lines[:-1], lines[-1][:50]],
    "empty": lambda lines: [],
    "another file": lambda lines: ['{"a": 1}'],
    "no mapping": lambda lines: ["[]", *lines[1:]],
    "unknown key": lambda lines: [*lines[:-1], lines[-1].replace('"output"', '"outputs"')],
    "longer answers": lambda lines: [*lines[:-1], lines[-1].replace('"output":7', '"output":9')],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "a.jsonl"
    write(make(FIRST, SECOND), path)
    path.write_text("\n".join(DAMAGE[damage](path.read_text().splitlines())))
    with pytest.raises(RequestsError, match="delete it, it is made again"):
        read(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(RequestsError, match="delete it"):
        read(tmp_path / "none.jsonl")
