"""`trace`: replay of a Mooncake trace (Qin et al. 2024, arXiv 2407.00079): real arrivals, lengths and sharing, other words.

A line of the trace has the arrival in milliseconds, prompt and answer length in tokens, and one hash id for each 512 tokens
of the prompt, the last of which may be cut short; equal ids are equal tokens. Each id becomes a block of text of its own, so
an infinite cache hits exactly the blocks that the trace hits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from sgl_hq.launch.load_ab.requests_file import LoadRequest, RequestSet, phase_sets
from sgl_hq.launch.load_ab.texts import TextPieces, read_lines
from sgl_hq.launch.load_ab.workload_spec import MAX_REQUESTS, MAX_TOKENS, TextWorkloadSpec, message
from sgl_hq.launch.workload import WorkloadError
from sgl_hq.page_format import PAGE_TOKENS

TRACE_BLOCK_TOKENS = 512


class Trace(TextWorkloadSpec):
    kind: Literal["trace"]
    trace: Path = Field(description="the trace as JSON lines, path from the working directory")
    requests: int = Field(ge=1, le=MAX_REQUESTS, description="the first so many requests that are not too long")
    time_scale: float = Field(default=1.0, gt=0, le=1000, description="arrivals are the trace's times this; 0.5: twice as fast")
    max_context: int | None = Field(
        default=None, ge=2, le=MAX_TOKENS, description="requests whose prompt and answer, as replayed, have more tokens are dropped"
    )
    block_tokens: int = Field(
        default=TRACE_BLOCK_TOKENS, ge=PAGE_TOKENS, le=TRACE_BLOCK_TOKENS, multiple_of=PAGE_TOKENS,
        description="tokens replayed for a block of 512; prompt and answer lengths shrink along",
    )  # fmt: skip


class TraceLine(BaseModel):
    """One request of the trace; other keys are not read."""

    timestamp: float = Field(ge=0)
    input_length: int = Field(ge=1)
    output_length: int = Field(ge=1)
    hash_ids: tuple[int, ...]

    @model_validator(mode="after")
    def _blocks(self) -> TraceLine:
        if len(self.hash_ids) != math.ceil(self.input_length / TRACE_BLOCK_TOKENS):
            raise ValueError(f"{len(self.hash_ids)} hash ids for {self.input_length} tokens in blocks of {TRACE_BLOCK_TOKENS}")
        return self

    def prompt_tokens(self, block_tokens: int) -> int:
        """As replayed: whole blocks and the scaled rest, at least one token of it."""
        whole = len(self.hash_ids) - 1
        return whole * block_tokens + _scaled(self.input_length - whole * TRACE_BLOCK_TOKENS, block_tokens)

    def output_tokens(self, block_tokens: int) -> int:
        return _scaled(self.output_length, block_tokens)


def request_sets(spec: Trace, tokenizer: Any, seed: int) -> list[RequestSet]:
    """One phase, cold: the trace brings its own sharing."""
    kept, dropped = _select(spec)
    pieces = TextPieces(tokenizer, spec.text, seed)
    blocks: dict[int, tuple[int, ...]] = {}
    requests = []
    for line in kept:
        for block in line.hash_ids:
            if block not in blocks:
                blocks[block] = pieces.take(spec.block_tokens)
        tokens = [token for block in line.hash_ids for token in blocks[block]]
        requests.append(
            LoadRequest(
                prompt=tuple(tokens[: line.prompt_tokens(spec.block_tokens)]),
                output=line.output_tokens(spec.block_tokens),
                at_s=(line.timestamp - kept[0].timestamp) / 1000 * spec.time_scale,
                group="trace",
            )
        )
    about = (
        f"the first {len(kept)} requests of {spec.trace.name}"
        + (f" of at most {spec.max_context} tokens ({dropped} longer ones dropped)" if spec.max_context else "")
        + f", arrivals times {spec.time_scale:g}, each block of {TRACE_BLOCK_TOKENS} tokens replayed as {spec.block_tokens} of text"
    )
    return phase_sets(spec.name, spec.kind, seed, None, about, {"cold": requests})


def _select(spec: Trace) -> tuple[list[TraceLine], int]:
    """The requests to replay, in order of arrival, and how many before the last of them were too long."""
    kept, dropped = [], 0
    for line in _lines(spec.trace):
        if spec.max_context and line.prompt_tokens(spec.block_tokens) + line.output_tokens(spec.block_tokens) > spec.max_context:
            dropped += 1
            continue
        kept.append(line)
        if len(kept) == spec.requests:
            return kept, dropped
    raise WorkloadError(
        f"{spec.name}: {spec.trace} has {len(kept)} requests that fit, not {spec.requests}: lower requests or raise max_context"
    )


def _lines(path: Path) -> Iterator[TraceLine]:
    for number, line in enumerate(read_lines(path, "the trace"), 1):
        try:
            yield TraceLine.model_validate_json(line)
        except ValidationError as error:
            raise WorkloadError(f"{path}, line {number}, is no request of a Mooncake trace ({message(error.errors()[0])}): "
                                "take another file") from error  # fmt: skip


def _scaled(tokens: int, block_tokens: int) -> int:
    return max(1, round(tokens * block_tokens / TRACE_BLOCK_TOKENS))
