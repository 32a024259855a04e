"""The score of a GSM8K answer: its last number, in value."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest

from sgl_hq.launch.load_ab.score_gsm8k import last_number, reference, score

DATA = Path(__file__).parent / "data" / "gsm8k-12.jsonl"

NUMBERS = {
    "She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18": "18",
    "The answer is $1,080.": "1080",
    "#### 1,234,567": "1234567",
    "it costs $12.50": "12.5",
    "#### 18.00": "18",
    "#### -7": "-7",
    "a loss of -$5": "-5",
    "a loss of $-5": "-5",
    "a loss of −5": "-5",
    "7-3": "3",
    "between 10-15": "15",
    "(a)-3": "3",
    "the values 3,4": "4",
    "12,34": "34",
    "ends in 1,000,": "1000",
    "about .5": "0.5",
    "50%": "50",
    "the first of 3. Then 4.": "4",
    "Question 2": "2",
    "no number": None,
    "": None,
}


@pytest.mark.parametrize("text", NUMBERS)
def test_last_number(text):
    assert last_number(text) == (None if NUMBERS[text] is None else Decimal(NUMBERS[text]))


@pytest.mark.parametrize(
    "text, answer, right",
    [("so 18", "18", 1), ("so $18.00", "18", 1), ("so 1,080", "1080", 1), ("18 or 19", "18", 0), ("so -18", "18", 0), ("", "18", 0)],
)
def test_score(text, answer, right):
    assert score(text, answer) == right


def test_reference_is_what_stands_after_the_mark():
    assert reference("5 and 6\n#### 1,080") == "1080"
    assert reference("#### -3") == "-3"
    for solution in ("the answer is 5", "5\n#### none"):
        with pytest.raises(ValueError, match="no '#### number'"):
            reference(solution)


def test_every_solution_of_the_file_is_its_own_right_answer_and_no_others():
    solutions = [json.loads(line)["answer"] for line in DATA.read_text().splitlines()]
    answers = [reference(solution) for solution in solutions]
    assert len(set(answers)) == 12
    for solution in solutions:
        assert sum(score(solution, answer) for answer in answers) == 1
