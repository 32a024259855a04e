"""`unshared`: random token ids, nothing shared: the control, where packing and grouping can win nothing and must not lose."""

from __future__ import annotations

import random
from typing import Any, Literal

from pydantic import Field

from sgl_hq.launch.load_ab.requests_file import LoadRequest, RequestSet, phase_sets
from sgl_hq.launch.load_ab.texts import ordinary_ids
from sgl_hq.launch.load_ab.workload_spec import MAX_REQUESTS, MAX_TOKENS, WorkloadSpec


class Unshared(WorkloadSpec):
    kind: Literal["unshared"]
    requests: int = Field(ge=1, le=MAX_REQUESTS, description="requests, each sent once")
    context: int = Field(ge=16, le=MAX_TOKENS, description="prompt tokens of every request")
    output: int = Field(ge=1, le=MAX_TOKENS, description="tokens generated for each request")


def request_sets(spec: Unshared, tokenizer: Any, seed: int) -> list[RequestSet]:
    """One phase, cold: nothing comes back that a cache could have."""
    ids = ordinary_ids(tokenizer)
    draw = random.Random(f"unshared {seed}")
    requests = [
        LoadRequest(tuple(draw.choices(ids, k=spec.context)), spec.output, group=f"request-{index}") for index in range(spec.requests)
    ]
    about = f"{spec.requests} prompts of {spec.context} random tokens, nothing shared"
    return phase_sets(spec.name, spec.kind, seed, spec.context, about, {"cold": requests})
