"""`fewshot`: GSM8K problems behind one shared prefix of solved ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from load_ab.word_tokenizer import WordTokenizer

from sgl_hq.launch.load_ab.workload_fewshot import Fewshot, request_sets
from sgl_hq.launch.workload import WorkloadError

DATA = Path(__file__).parent / "data" / "gsm8k-12.jsonl"
PROBLEMS = [json.loads(line) for line in DATA.read_text().splitlines()]


def spec(**options) -> Fewshot:
    return Fewshot(**{"name": "g", "kind": "fewshot", "data": DATA, "shots": 3, "questions": 9} | options)


def test_prompts_are_solved_problems_and_a_question():
    tokenizer = WordTokenizer()
    (asked,) = request_sets(spec(), tokenizer, seed=1)
    shots = " ".join(f"Question: {p['question']} Answer: {p['answer']}" for p in PROBLEMS[:3])
    for problem, request in zip(PROBLEMS[3:], asked.requests, strict=True):
        text = f"<begin> {shots} Question: {problem['question']} Answer:"
        assert tokenizer.decode(request.prompt).split() == text.split()
        assert (request.output, request.stop) == (256, ("\n\nQuestion:",))
    assert [request.answer for request in asked.requests] == ["540", "20", "64", "260", "160", "45", "460", "366", "694"]


def test_all_share_the_prefix():
    tokenizer = WordTokenizer()
    (asked,) = request_sets(spec(), tokenizer, seed=1)
    shots = "".join(f"Question: {p['question']}\nAnswer: {p['answer']}\n\n" for p in PROBLEMS[:3])
    prefix = tuple(tokenizer(shots)["input_ids"])
    assert {request.prompt[: len(prefix)] for request in asked.requests} == {prefix}
    assert asked.ideal_cached_tokens == 8 * (len(prefix) // 64 * 64) > 0


def test_too_few_problems_are_refused():
    with pytest.raises(WorkloadError, match="12 problems, 3 shots and 10 questions need 13: ask fewer questions"):
        request_sets(spec(questions=10), WordTokenizer(), seed=1)


@pytest.mark.parametrize(
    "line, reason",
    [('{"question": "How many?"}', "Field required"), ('{"question": "How many?", "answer": "5"}', "no '#### number'")],
)
def test_another_file_is_refused(tmp_path, line, reason):
    (tmp_path / "d.jsonl").write_text(f"{json.dumps(PROBLEMS[0])}\n{line}\n")
    with pytest.raises(WorkloadError, match=f"is no GSM8K file .*{reason}"):
        request_sets(spec(data=tmp_path / "d.jsonl", shots=1, questions=1), WordTokenizer(), seed=1)
