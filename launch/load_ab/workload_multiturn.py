"""`multiturn`: chats that grow turn by turn, behind system prompts that chats share or have of their own.

The history that a turn sends is fixed text, answers included, so every arm is asked the same; what an arm generates is
measured and discarded. So the tokens of a generated answer never serve a later turn, in any arm.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from sgl_hq.launch.load_ab.requests_file import LoadRequest, Phase, RequestSet, phase_sets
from sgl_hq.launch.load_ab.texts import MARK_TOKENS, TextPieces
from sgl_hq.launch.load_ab.workload_spec import MAX_REQUESTS, MAX_TOKENS, TextWorkloadSpec


class Multiturn(TextWorkloadSpec):
    kind: Literal["multiturn"]
    chats: int = Field(ge=1, le=MAX_REQUESTS, description="chats in a phase")
    turns: int = Field(ge=1, le=1000, description="questions of each chat")
    systems: int = Field(default=1, ge=1, le=MAX_REQUESTS, description="different system prompts; as many as chats: each its own")
    system: int = Field(ge=MARK_TOKENS, le=MAX_TOKENS, description="tokens of a system prompt")
    question: int = Field(ge=MARK_TOKENS, le=MAX_TOKENS, description="tokens of each question")
    answer: int = Field(ge=MARK_TOKENS, le=MAX_TOKENS, description="tokens of each answer in the history")
    output: int = Field(ge=1, le=MAX_TOKENS, description="tokens generated, and discarded, for each turn")

    @model_validator(mode="after")
    def _sizes(self) -> Multiturn:
        if self.systems > self.chats:
            raise ValueError("systems must be at most chats: each system prompt needs a chat")
        if self.context > MAX_TOKENS:
            raise ValueError(f"the last turn has {self.context} tokens, at most {MAX_TOKENS} can be made: shorten the chats")
        if self.chats * self.turns > MAX_REQUESTS:
            raise ValueError(f"chats x turns must be at most {MAX_REQUESTS}")
        return self

    @property
    def context(self) -> int:
        """Prompt tokens of the last turn: the label."""
        return self.system + self.turns * self.question + (self.turns - 1) * self.answer


def request_sets(spec: Multiturn, tokenizer: Any, seed: int) -> list[RequestSet]:
    """Phase cold, then warm: other chats behind the same system prompts. Turn by turn over all chats."""
    pieces = TextPieces(tokenizer, spec.text, seed)
    systems = [pieces.take(spec.system) for _ in range(spec.systems)]
    phases: dict[Phase, list[LoadRequest]] = {phase: _phase(spec, systems, pieces) for phase in ("cold", "warm")}
    about = (
        f"{spec.chats} chats of {spec.turns} turns, questions of {spec.question} and fixed answers of {spec.answer} tokens of text, "
        f"behind {spec.systems} system prompt(s) of {spec.system}, turn by turn over all chats; the label is the last turn's prompt; "
        "generated answers are discarded; warm: other chats, same system prompts"
    )
    return phase_sets(spec.name, spec.kind, seed, spec.context, about, phases)


def _phase(spec: Multiturn, systems: list[tuple[int, ...]], pieces: TextPieces) -> list[LoadRequest]:
    requests: list[LoadRequest] = []
    histories = [systems[chat % spec.systems] for chat in range(spec.chats)]
    for turn in range(spec.turns):
        for chat, history in enumerate(histories):
            prompt = history + pieces.take(spec.question)
            before = len(requests) - spec.chats if turn else None
            requests.append(LoadRequest(prompt, spec.output, after=before, group=f"chat-{chat}"))
            histories[chat] = prompt + pieces.take(spec.answer)
    return requests
