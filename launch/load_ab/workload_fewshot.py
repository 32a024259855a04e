"""`fewshot`: problems of GSM8K (Cobbe et al. 2021, arXiv 2110.14168) behind a shared prefix of solved ones; answers are scored.

The form is that of SGLang's own GSM8K benchmark: "Question: ...\\nAnswer: ...", no chat template.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from sgl_hq.launch.load_ab.requests_file import LoadRequest, RequestSet, phase_sets
from sgl_hq.launch.load_ab.score_gsm8k import reference
from sgl_hq.launch.load_ab.texts import read_lines
from sgl_hq.launch.load_ab.workload_spec import MAX_REQUESTS, MAX_TOKENS, WorkloadSpec, message
from sgl_hq.launch.workload import WorkloadError

STOP = ("\n\nQuestion:",)  # where a model that goes on writes a problem of its own


class Fewshot(WorkloadSpec):
    kind: Literal["fewshot"]
    data: Path = Field(description="GSM8K as JSON lines with question and answer, path from the working directory")
    shots: int = Field(default=8, ge=1, le=1000, description="solved problems in the shared prefix, the first of the file")
    questions: int = Field(ge=1, le=MAX_REQUESTS, description="problems asked and scored, those that follow the shots")
    output: int = Field(default=256, ge=1, le=MAX_TOKENS, description="tokens an answer has at most")


class Problem(BaseModel):
    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)


def request_sets(spec: Fewshot, tokenizer: Any, seed: int) -> list[RequestSet]:
    """One phase, cold: each problem is asked once, so that the score counts each once. The seed changes nothing here."""
    problems = _problems(spec)
    shots, asked = problems[: spec.shots], problems[spec.shots :]
    prefix = "".join(f"{_ask(shot)} {shot.answer}\n\n" for shot in shots)
    requests = [
        LoadRequest(
            # As one text, whose tokens at the seam are those the model knows, with a begin-of-text token where it wants one.
            prompt=tuple(tokenizer(prefix + _ask(problem), verbose=False)["input_ids"]),
            output=spec.output,
            group="fewshot",
            stop=STOP,
            answer=reference(problem.answer),
        )
        for problem in asked
    ]
    about = f"{len(asked)} problems of {spec.data.name} behind a shared prefix of {spec.shots} solved ones"
    return phase_sets(spec.name, spec.kind, seed, None, about, {"cold": requests})


def _ask(problem: Problem) -> str:
    return f"Question: {problem.question}\nAnswer:"


def _problems(spec: Fewshot) -> list[Problem]:
    needed = spec.shots + spec.questions
    lines = read_lines(spec.data, "the data")
    if len(lines) < needed:
        raise WorkloadError(
            f"{spec.name}: {spec.data} has {len(lines)} problems, {spec.shots} shots and {spec.questions} questions need {needed}: "
            "ask fewer questions"
        )
    try:
        problems = [Problem.model_validate_json(line) for line in lines[:needed]]
        for problem in problems:
            reference(problem.answer)
    except ValueError as error:  # pydantic's own is one
        reason = message(error.errors()[0]) if isinstance(error, ValidationError) else error
        raise WorkloadError(f"{spec.data} is no GSM8K file ({reason}): take one with question and answer") from error
    return problems
