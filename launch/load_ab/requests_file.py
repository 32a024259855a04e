"""The requests of one phase of a workload, and the file that every arm answers: equal bytes, whose sha256 stands in every row.

Prompts are token ids, so their lengths are exact. A set refuses to exist when a prompt is not as long as its label says.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from sgl_hq.page_format import PAGE_TOKENS

Phase = Literal["cold", "warm"]


class RequestsError(ValueError):
    """A set of requests is not what it says it is; the message names the request or the file."""


@dataclass(frozen=True)
class LoadRequest:
    """prompt: token ids, the whole prompt. output: tokens to generate, exactly so many (end of text ignored) unless `stop`.

    at_s: arrival, seconds after the phase's start; None: as soon as a place is free (closed loop).
    after: index of the request that must have ended before, always smaller than the own index (a chat's previous turn).
    group: what shares the content ("system-3"). stop: not empty: the answer may end earlier, at end of text or one of these.
    answer: the right result, for task scores.
    """

    prompt: tuple[int, ...]
    output: int
    at_s: float | None = None
    after: int | None = None
    group: str = ""
    stop: tuple[str, ...] = ()
    answer: str | None = None


@dataclass(frozen=True)
class RequestSet:
    """One phase. context: the label, prompt tokens of every request; of a chat, of its last turn, earlier turns have fewer.

    ideal_cached_tokens: prompt tokens that an infinite cache (`InfiniteCache`) would have, after the phases before this one.
    Raises RequestsError on construction, naming the request, when lengths, arrivals or `after` are not as stated.
    """

    workload: str
    kind: str
    phase: Phase
    seed: int
    context: int | None
    requests: tuple[LoadRequest, ...]
    about: str
    ideal_cached_tokens: int

    def __post_init__(self) -> None:
        if not self.requests:
            raise RequestsError(f"{self._name} has no requests: ask for at least one")
        continued = {request.after for request in self.requests}
        for index, request in enumerate(self.requests):
            wrong = _wrong(request, index) or self._wrong_length(request, index in continued)
            if wrong:
                raise RequestsError(f"Request {index} of {self._name} {wrong}: mend the workload that made it")
        for index, (one, two) in enumerate(pairwise(self.requests), 1):
            if (one.at_s is None) != (two.at_s is None) or (one.at_s is not None and one.at_s > two.at_s):
                raise RequestsError(f"Request {index} of {self._name} arrives before request {index - 1}: order them by arrival")

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self.requests)

    @property
    def output_tokens(self) -> int:
        """Tokens asked for; requests with `stop` may give fewer."""
        return sum(request.output for request in self.requests)

    def header(self) -> dict[str, Any]:
        """The file's first line: every field but the requests, and their number and tokens."""
        facts = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "requests"}
        totals = {"requests": len(self.requests), "prompt_tokens": self.prompt_tokens, "output_tokens": self.output_tokens}
        return facts | totals

    @property
    def _name(self) -> str:
        return f"workload {self.workload}, phase {self.phase},"

    def _wrong_length(self, request: LoadRequest, continued: bool) -> str:
        length = len(request.prompt)
        if self.context is None or length == self.context or (continued and length < self.context):
            return ""
        return f"has a prompt of {length} tokens where the label says {self.context}"


def _wrong(request: LoadRequest, index: int) -> str:
    if not request.prompt or request.output < 1:
        return f"has {len(request.prompt)} prompt tokens and asks for {request.output}, at least 1 each is needed"
    if request.after is not None and not 0 <= request.after < index:
        return f"waits for request {request.after}, which is not an earlier one"
    return ""


class InfiniteCache:
    """A radix cache that never evicts, with pages of 64 tokens, asked request by request in the order of the file.

    Only whole pages hit, and the last prompt token is always computed (SGLang: `Req._compute_max_prefix_len`). Answers are
    left out: no prompt here continues a generated one. With smaller pages, or luck, a server can have a few tokens more.
    """

    def __init__(self) -> None:
        self._pages: set[bytes] = set()  # a page is known by a digest of all tokens up to its end

    def cached_tokens(self, prompt: Sequence[int]) -> int:
        """Tokens of this prompt that the prompts before it left; keeps the whole pages of this one."""
        digest, hit = b"", 0
        for end in range(PAGE_TOKENS, len(prompt) + 1, PAGE_TOKENS):
            page = array("q", prompt[end - PAGE_TOKENS : end])
            digest = hashlib.blake2b(digest + page.tobytes(), digest_size=16).digest()
            if digest in self._pages and end < len(prompt):
                hit = end
            self._pages.add(digest)
        return hit


def phase_sets(
    workload: str, kind: str, seed: int, context: int | None, about: str, phases: Mapping[Phase, Sequence[LoadRequest]]
) -> list[RequestSet]:
    """One set for each phase, in order; a later phase finds in the cache what the earlier ones left."""
    cache, sets = InfiniteCache(), []
    for phase, requests in phases.items():
        cached = sum(cache.cached_tokens(request.prompt) for request in requests)
        sets.append(RequestSet(workload, kind, phase, seed, context, tuple(requests), about, cached))
    return sets


def write(requests: RequestSet, path: Path) -> str:
    """JSON lines, the header first; written beside `path`, then renamed. The sha256 of the file's bytes, in hex."""
    lines = [requests.header(), *(vars(request) for request in requests.requests)]
    data = "".join(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n" for line in lines).encode()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return hashlib.sha256(data).hexdigest()


def read(path: Path) -> RequestSet:
    """Raises RequestsError when the file is not one of ours, incomplete or changed by hand."""
    try:
        header, *lines = [json.loads(line) for line in path.read_text().splitlines()]
        facts = {field.name: header[field.name] for field in fields(RequestSet) if field.name != "requests"}
        requests = [LoadRequest(**line | {"prompt": tuple(line["prompt"]), "stop": tuple(line["stop"])}) for line in lines]
        read_set = RequestSet(requests=tuple(requests), **facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestsError(f"{path} cannot be read as a requests file ({error!r}): delete it, it is made again") from error
    if read_set.header() != header:
        raise RequestsError(f"{path} does not hold what its first line says: delete it, it is made again")
    return read_set
