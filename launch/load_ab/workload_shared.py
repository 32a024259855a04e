"""`shared`: long prefixes (system prompts, documents) that several users each ask another question about.

Prefix and question are both functions of `context`, and together exactly as long: the label is the length of the request.
"""

from __future__ import annotations

import random
from typing import Any, Literal

from pydantic import Field, model_validator

from sgl_hq.launch.load_ab.requests_file import LoadRequest, Phase, RequestSet, phase_sets
from sgl_hq.launch.load_ab.texts import TextPieces
from sgl_hq.launch.load_ab.workload_spec import MAX_REQUESTS, MAX_TOKENS, TextWorkloadSpec
from sgl_hq.launch.workload import WorkloadError

MIN_QUESTION_TOKENS = 16


class Shared(TextWorkloadSpec):
    kind: Literal["shared"]
    context: int = Field(ge=128, le=MAX_TOKENS, description="prompt tokens of every request: prefix and question")
    question_share: float = Field(
        default=1 / 64, gt=0, le=0.5, description=f"share of the context that is question, at least {MIN_QUESTION_TOKENS} tokens"
    )
    prefixes: int | None = Field(default=None, ge=1, le=MAX_REQUESTS, description="different prefixes; or give working_set")
    working_set: float | None = Field(
        default=None, gt=0, le=1000, description="prefixes x context as a multiple of the KV budget in bf16 tokens"
    )
    users: int = Field(ge=1, le=MAX_REQUESTS, description="requests on each prefix in a phase")
    output: int = Field(ge=1, le=MAX_TOKENS, description="tokens generated for each request")
    order: Literal["random", "grouped"] = Field(
        default="random", description="random: all requests shuffled; grouped: the users of a prefix one after another"
    )

    @model_validator(mode="after")
    def _one_size(self) -> Shared:
        if (self.prefixes is None) == (self.working_set is None):
            raise ValueError("give either prefixes or working_set, and not both")
        return self

    @property
    def question(self) -> int:
        return max(MIN_QUESTION_TOKENS, round(self.context * self.question_share))

    def sized(self, kv_tokens: int) -> Shared:
        """The same with `prefixes` in place of `working_set`. kv_tokens: the KV budget of every arm, in bf16 tokens."""
        if self.working_set is None:
            return self
        prefixes = round(self.working_set * kv_tokens / self.context)
        if not 1 <= prefixes <= MAX_REQUESTS:
            raise WorkloadError(
                f"{self.name}: {self.working_set} times {kv_tokens} tokens are {prefixes} prefixes of {self.context}, "
                f"between 1 and {MAX_REQUESTS} can be made: change context or working_set"
            )
        return self.model_copy(update={"prefixes": prefixes, "working_set": None})


def request_sets(spec: Shared, tokenizer: Any, seed: int) -> list[RequestSet]:
    """Phase cold, then warm: the same prefixes, other questions, another order. `spec` must be `sized`."""
    if spec.prefixes is None:
        raise WorkloadError(f"{spec.name}: the working set is not sized: call sized(kv_tokens) first")
    pieces = TextPieces(tokenizer, spec.text, seed)
    prefixes = [pieces.take(spec.context - spec.question) for _ in range(spec.prefixes)]
    phases: dict[Phase, list[LoadRequest]] = {}
    for phase in ("cold", "warm"):
        draw = random.Random(f"shared {phase} {seed}")
        groups = list(range(spec.prefixes))
        draw.shuffle(groups)
        phases[phase] = [
            LoadRequest(prefixes[group] + pieces.take(spec.question), spec.output, group=f"prefix-{group}")
            for group in groups
            for _ in range(spec.users)
        ]
        if spec.order == "random":
            draw.shuffle(phases[phase])
    about = (
        f"{spec.prefixes} prefixes of {spec.context - spec.question} tokens of text, {spec.users} users each with a question of "
        f"{spec.question}, {'shuffled' if spec.order == 'random' else 'prefix by prefix'}; warm: other questions, another order"
    )
    return phase_sets(spec.name, spec.kind, seed, spec.context, about, phases)
