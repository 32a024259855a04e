"""The chat workload: sizes, order, distinctness and the length of the shared runs, with a plain word tokenizer."""

from __future__ import annotations

import pytest

from sgl_hq.launch.workload import Workload, WorkloadError, question, shared_run_tokens, system_prompt


class WordTokenizer:
    """Words are tokens; the chat template adds one token before and two after each message."""

    def __init__(self):
        self.ids: dict[str, int] = {}

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [self.ids.setdefault(word, len(self.ids)) for word in text.split(" ")]}

    def decode(self, ids, clean_up_tokenization_spaces):
        words = {i: word for word, i in self.ids.items()}
        return " ".join(words[i] for i in ids)

    def apply_chat_template(self, messages, add_generation_prompt, return_dict):
        text = " ".join(f"<{m['role']}> {m['content']} <end> \n" for m in messages)
        return self(text + " <assistant>" * add_generation_prompt, add_special_tokens=False)


@pytest.fixture
def tokenizer():
    return WordTokenizer()


def test_waves_hold_every_user_of_every_prefix_once_and_mix_the_prefixes(tokenizer):
    waves = Workload(prefixes=4, users=16, concurrency=8, prefix_tokens=100).waves(tokenizer)
    assert [len(wave) for wave in waves] == [8] * 8
    assert {(r.prefix, r.user) for wave in waves for r in wave} == {(p, u) for p in range(4) for u in range(16)}
    assert all({r.prefix for r in wave} == {0, 1, 2, 3} for wave in waves)


def test_a_rest_smaller_than_the_concurrency_is_a_wave_of_its_own(tokenizer):
    waves = Workload(prefixes=3, users=3, concurrency=4, prefix_tokens=100).waves(tokenizer)
    assert [len(wave) for wave in waves] == [4, 4, 1]


def test_same_parameters_give_the_same_requests(tokenizer):
    assert Workload(prefix_tokens=64).waves(tokenizer) == Workload(prefix_tokens=64).waves(WordTokenizer())


def test_one_prefix_is_one_system_prompt_and_users_ask_different_questions(tokenizer):
    requests = [r for wave in Workload(prefix_tokens=100).waves(tokenizer) for r in wave]
    for prefix in range(4):
        mine = [r.messages for r in requests if r.prefix == prefix]
        assert len({m[0]["content"] for m in mine}) == 1
        assert len({m[1]["content"] for m in mine}) == 16
    assert len({r.messages[0]["content"] for r in requests}) == 4


@pytest.mark.parametrize("tokens", [64, 768, 5000])
def test_the_shared_run_is_the_shortest_one_that_reaches_the_length_asked_for(tokenizer, tokens):
    prompt = system_prompt(0, 4, tokens, tokenizer)
    assert shared_run_tokens(prompt, tokenizer) == tokens


def test_64_distinct_questions():
    assert len({question(user) for user in range(64)}) == 64


def test_a_prefix_longer_than_the_reference_is_refused(tokenizer):
    with pytest.raises(WorkloadError, match="shorter prefixes"):
        system_prompt(0, 4, 10_000_000, tokenizer)


@pytest.mark.parametrize("wrong", [{"users": 65}, {"users": 0}, {"concurrency": 0}, {"prefixes": -1}, {"output_tokens": 0}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(WorkloadError, match=next(iter(wrong))):
        Workload(**wrong)
