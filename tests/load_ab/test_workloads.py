"""The registry: what a plan may say, and that the same plan makes the same requests, with a real tokenizer too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from load_ab.word_tokenizer import WordTokenizer

from sgl_hq.launch.demo_model import ensure_demo_model
from sgl_hq.launch.load_ab.requests_file import read, write
from sgl_hq.launch.load_ab.texts import ordinary_ids
from sgl_hq.launch.load_ab.workloads import parse_workload, request_sets
from sgl_hq.launch.workload import WorkloadError

DATA = Path(__file__).parent / "data"
PLANS = {
    "shared": {"context": 512, "working_set": 2.5, "users": 3, "output": 4},
    "multiturn": {"chats": 4, "turns": 3, "system": 128, "question": 30, "answer": 40, "output": 4},
    "trace": {"trace": str(DATA / "mooncake-slice.jsonl"), "requests": 20, "block_tokens": 64},
    "fewshot": {"data": str(DATA / "gsm8k-12.jsonl"), "shots": 4, "questions": 8},
    "unshared": {"requests": 10, "context": 512, "output": 4},
}
PHASES = {"shared": ["cold", "warm"], "multiturn": ["cold", "warm"]}


def plan(kind: str, **options) -> dict:
    return {"name": f"my-{kind}", "kind": kind} | PLANS[kind] | options


@pytest.fixture(scope="module")
def smollm2():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ensure_demo_model())


@pytest.mark.parametrize("kind", PLANS)
def test_with_a_real_tokenizer(kind, smollm2, tmp_path):
    sets = request_sets(parse_workload(plan(kind)), smollm2, seed=1, kv_tokens=4096)
    assert [requests.phase for requests in sets] == PHASES.get(kind, ["cold"])
    ordinary = set(ordinary_ids(smollm2))
    for requests in sets:
        assert (requests.workload, requests.kind, requests.seed) == (f"my-{kind}", kind, 1)
        assert all(ordinary.issuperset(request.prompt) for request in requests.requests)
        write(requests, tmp_path / "a.jsonl")
        assert read(tmp_path / "a.jsonl") == requests


def test_few_shot_prompts_share_all_tokens_of_the_solved_problems(smollm2):
    (asked,) = request_sets(parse_workload(plan("fewshot")), smollm2, seed=1, kv_tokens=4096)
    shared = os.path.commonprefix([request.prompt for request in asked.requests])
    texts = [smollm2.decode(tokens, clean_up_tokenization_spaces=False) for tokens in (shared, asked.requests[0].prompt)]
    assert texts[0].startswith("Question: Janet") and texts[0].endswith("#### 540\n\nQuestion:")
    assert texts[1].startswith(texts[0]) and texts[1].endswith("\nAnswer:")


@pytest.mark.parametrize("kind", PLANS)
def test_the_seed_makes_the_requests(kind):
    def requests(seed: int) -> list:
        return [phase.requests for phase in request_sets(parse_workload(plan(kind)), WordTokenizer(), seed, kv_tokens=4096)]

    assert requests(1) == requests(1)
    if kind == "fewshot":  # the problems are given
        assert requests(1) == requests(2)
    else:
        prompts = [{request.prompt for phase in requests(seed) for request in phase} for seed in (1, 2)]
        assert prompts[0].isdisjoint(prompts[1])


def test_working_set_is_sized_from_the_budget():
    for kv_tokens, prefixes in ((4096, 20), (40960, 200)):
        cold, _ = request_sets(parse_workload(plan("shared", users=1)), WordTokenizer(), 1, kv_tokens)
        assert len(cold.requests) == prefixes


WRONG = {
    "no kind": ({"name": "a"}, "^Workload a: kind must be one of shared, multiturn, trace, fewshot, unshared. Mend it in the plan$"),
    "unknown kind": ({"name": "a", "kind": "share"}, "kind must be one of shared"),
    "no name": ({"kind": "unshared"} | PLANS["unshared"], r"Workload \(no name\): name: Field required"),
    "a name that is no file name": (plan("unshared", name="a/b"), "Workload a/b: name: "),
    "unknown key": (plan("unshared", users=3), "users is unknown, the keys of unshared are name, phases, kind, requests, context, output"),
    "two wrong keys": (plan("unshared", context=1, output=0), "context: .* 16; output: .* 1"),
    "a rule over several keys": (plan("shared", prefixes=3), "Workload my-shared: give either prefixes or working_set"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_plan_is_told_what_to_mend(case):
    given, message = WRONG[case]
    with pytest.raises(WorkloadError, match=message):
        parse_workload(given)
