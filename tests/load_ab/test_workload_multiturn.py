"""`multiturn`: every turn continues its chat's last one, the label is the last turn's length, phases share system prompts only."""

from __future__ import annotations

import pytest
from load_ab.word_tokenizer import WordTokenizer

from sgl_hq.launch.load_ab.workload_multiturn import Multiturn, request_sets

SPEC = Multiturn(name="m", kind="multiturn", chats=6, turns=3, systems=2, system=128, question=20, answer=44, output=8)


@pytest.fixture(scope="module")
def phases():
    return request_sets(SPEC, WordTokenizer(), seed=1)


def test_lengths_follow_the_turns_up_to_the_label(phases):
    for phase in phases:
        assert [len(request.prompt) for request in phase.requests] == [148] * 6 + [212] * 6 + [276] * 6
        assert phase.context == SPEC.context == 276


def test_a_turn_waits_for_the_one_before_it_and_continues_its_prompt(phases):
    for phase in phases:
        assert [request.after for request in phase.requests] == [None] * 6 + list(range(12))
        for request in phase.requests[6:]:
            before = phase.requests[request.after]
            assert request.group == before.group and request.prompt[: len(before.prompt)] == before.prompt


def test_chats_share_their_system_prompt_alone(phases):
    prompts = [request.prompt for phase in phases for request in phase.requests[:6]]
    assert len({prompt[:128] for prompt in prompts}) == 2 and prompts[0][:128] == prompts[2][:128]
    assert len({prompt[128:130] for prompt in prompts}) == 12  # warm: other chats


def test_ideal_hits_are_system_prompts_and_earlier_turns(phases):
    cold, warm = phases
    turns = 6 * (2 * 64 + 3 * 64)  # 148 and 212 tokens of earlier turns: 2 and 3 whole pages
    assert cold.ideal_cached_tokens == 4 * 128 + turns
    assert warm.ideal_cached_tokens == 6 * 128 + turns


def test_own_system_prompts():
    cold, _ = request_sets(SPEC.model_copy(update={"systems": 6}), WordTokenizer(), seed=1)
    assert len({request.prompt[:2] for request in cold.requests}) == 6


@pytest.mark.parametrize(
    "change, message",
    [({"systems": 7}, "at most chats"), ({"turns": 1000, "answer": 2000}, "shorten the chats"), ({"chats": 40_000}, "chats x turns")],
)
def test_sizes_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        Multiturn(**SPEC.model_dump() | change)
