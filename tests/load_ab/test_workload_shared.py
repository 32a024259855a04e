"""`shared`: the label is the length, the phases share prefixes and nothing else, the working set is a multiple of the budget."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st
from load_ab.word_tokenizer import WordTokenizer

from sgl_hq.launch.load_ab.workload_shared import MIN_QUESTION_TOKENS, Shared, request_sets
from sgl_hq.launch.workload import WorkloadError

SPEC = Shared(name="s", kind="shared", context=1024, prefixes=5, users=4, output=8)  # prefix 1008, question 16


@given(st.integers(128, 1 << 20))
def test_prefix_and_question_both_follow_the_context(context):
    spec = SPEC.model_copy(update={"context": context})
    assert MIN_QUESTION_TOKENS <= spec.question <= context / 2
    assert abs(spec.question - context / 64) <= 0.5 or spec.question == MIN_QUESTION_TOKENS


@pytest.mark.parametrize("context", [128, 1000, 1024, 4111])
@pytest.mark.parametrize("share", [1 / 64, 0.3])
def test_requests_have_the_length_of_the_label_and_share_their_prefix_alone(context, share):
    spec = SPEC.model_copy(update={"context": context, "question_share": share})
    prefix = context - spec.question
    cold, warm = request_sets(spec, WordTokenizer(), seed=1)
    for phase in (cold, warm):
        assert phase.context == context and {len(request.prompt) for request in phase.requests} == {context}
        assert Counter(request.group for request in phase.requests) == {f"prefix-{i}": 4 for i in range(5)}
    prompts = [request.prompt for request in (*cold.requests, *warm.requests)]
    assert len({prompt[:prefix] for prompt in prompts}) == 5 == len({prompt[:2] for prompt in prompts})
    assert len({prompt[prefix : prefix + 2] for prompt in prompts}) == 40  # no question twice, warm ones included
    whole = prefix // 64 * 64
    assert (cold.ideal_cached_tokens, warm.ideal_cached_tokens) == (15 * whole, 20 * whole)


def test_orders():
    shuffled = [[r.group for r in phase.requests] for phase in request_sets(SPEC, WordTokenizer(), seed=1)]
    grouped = [
        [r.group for r in phase.requests]
        for phase in request_sets(SPEC.model_copy(update={"order": "grouped"}), WordTokenizer(), seed=1)
    ]
    assert all(len(list(groupby(order))) == 5 for order in grouped) and grouped[0] != grouped[1]
    assert all(len(list(groupby(order))) > 8 for order in shuffled) and shuffled[0] != shuffled[1]


def test_working_set_is_a_multiple_of_the_budget():
    spec = Shared(name="s", kind="shared", context=8256, working_set=2.6, users=4, output=8)
    assert spec.sized(200_000).prefixes == 63  # 2.6 * 200000 / 8256 = 62.98
    assert SPEC.sized(200_000) == SPEC
    with pytest.raises(WorkloadError, match="0 prefixes of 8256, between 1 and .* change context or working_set"):
        spec.sized(1000)
    with pytest.raises(WorkloadError, match="not sized"):
        request_sets(spec, WordTokenizer(), seed=1)


@pytest.mark.parametrize("sizes", [{}, {"prefixes": 3, "working_set": 2.0}])
def test_prefixes_or_working_set(sizes):
    with pytest.raises(ValueError, match="either prefixes or working_set"):
        Shared(name="s", kind="shared", context=1024, users=4, output=8, **sizes)
