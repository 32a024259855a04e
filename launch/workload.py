"""The chat workload of the A/B: a few long system prompts, several users each, cut into waves of concurrent requests.

The system prompts are chapters of Python's own reference (`pydoc_data.topics`, real English prose that every machine has),
the user turns are short questions about them. All requests with the same system prompt share a run of tokens: the chat
template's header, the system text and the template up to the question. That run is cut to the first length that reaches
`prefix_tokens`, so with a multiple of the page size the last shared page is a full one.
"""

from __future__ import annotations

import itertools
import pydoc_data.topics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

_INSTRUCTION = "You help programmers. Answer in one sentence, from this chapter of the Python reference:\n\n"

# User i of every system prompt asks question i. Two lists of eight give 64 distinct users of at most 30 tokens a question.
_QUESTIONS = (
    "What is this chapter about?",
    "Which keyword does it explain first?",
    "What happens when the name is not found?",
    "Which exception can be raised here, and when?",
    "Is there an example, and what does it show?",
    "What should a beginner remember from this?",
    "Which objects does the text mention?",
    "How does this behave inside a class body?",
)
_STYLES = (
    "",
    " Answer for a beginner.",
    " Be brief.",
    " Name the rule.",
    " Use plain words.",
    " Answer as a teacher would.",
    " Give the reason too.",
    " Mention one exception to it.",
)


class WorkloadError(ValueError):
    """The workload asked for cannot be made; the message says what can."""


class ChatRequest(NamedTuple):
    """One chat request: which system prompt, which user of it, and the messages sent."""

    prefix: int
    user: int
    messages: list[dict[str, str]]


@dataclass(frozen=True)
class Workload:
    """Shape of the load: `prefixes` x `users` requests in waves of `concurrency`, `output_tokens` generated for each."""

    prefixes: int = 4
    users: int = 16
    concurrency: int = 8
    prefix_tokens: int = 768
    output_tokens: int = 16

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise WorkloadError(f"{name} must be at least 1, not {value}")
        if self.users > len(_QUESTIONS) * len(_STYLES):
            raise WorkloadError(f"users must be at most {len(_QUESTIONS) * len(_STYLES)}: one distinct question each")

    def waves(self, tokenizer: Any) -> list[list[ChatRequest]]:
        """The requests in sending order, user by user over all system prompts, cut into waves."""
        systems = [system_prompt(i, self.prefixes, self.prefix_tokens, tokenizer) for i in range(self.prefixes)]
        requests = [
            ChatRequest(prefix, user, _messages(systems[prefix], question(user)))
            for user in range(self.users)
            for prefix in range(self.prefixes)
        ]
        return [requests[i : i + self.concurrency] for i in range(0, len(requests), self.concurrency)]


def question(user: int) -> str:
    """The user turn of user `user`; distinct for each of the 64 users."""
    return _QUESTIONS[user % len(_QUESTIONS)] + _STYLES[user // len(_QUESTIONS) % len(_STYLES)]


def system_prompt(index: int, count: int, prefix_tokens: int, tokenizer: Any) -> str:
    """System prompt `index` of `count`: the shortest cut of its text whose shared run reaches `prefix_tokens` tokens.

    `tokenizer` is a transformers tokenizer with a chat template. Raises WorkloadError when the Python reference is too short.
    """
    text = "".join(_chapters(index, count, characters=16 * prefix_tokens))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # The template and the instruction take some tokens, so the cut lies at or below prefix_tokens text tokens.
    low, high = 1, min(prefix_tokens, len(ids))
    while low < high:
        middle = (low + high) // 2
        if shared_run_tokens(_cut(ids, middle, tokenizer), tokenizer) >= prefix_tokens:
            high = middle
        else:
            low = middle + 1
    prompt = _cut(ids, high, tokenizer)
    if shared_run_tokens(prompt, tokenizer) < prefix_tokens:
        raise WorkloadError(f"The Python reference has no {count} texts of {prefix_tokens} tokens; ask for shorter prefixes")
    return prompt


def shared_run_tokens(system: str, tokenizer: Any) -> int:
    """Length of the token run that every user of this system prompt has in common."""
    one, two = (_render(system, q, tokenizer) for q in ("What is it?", "Is that so?"))
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, two)))


def _chapters(index: int, count: int, characters: int) -> Iterator[str]:
    """Chapters index, index + count, ... in order of falling length until `characters` are reached."""
    topics = sorted(pydoc_data.topics.topics.items(), key=lambda item: (-len(item[1]), item[0]))
    taken = 0
    for name, text in topics[index::count]:
        if taken >= characters:
            return
        yield f"Chapter {name}.\n\n{text}\n"
        taken += len(text)


def _cut(ids: list[int], tokens: int, tokenizer: Any) -> str:
    return _INSTRUCTION + tokenizer.decode(ids[:tokens], clean_up_tokenization_spaces=False)


def _messages(system: str, user: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def _render(system: str, user: str, tokenizer: Any) -> list[int]:
    rendered = tokenizer.apply_chat_template(_messages(system, user), add_generation_prompt=True, return_dict=True)
    return list(rendered["input_ids"])
