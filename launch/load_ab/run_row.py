"""A run row: all figures of one arm, workload, phase and repeat, as plain JSON values, by the same code for every arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sgl_hq.launch.kv_accounts import AccountsError
from sgl_hq.launch.load_ab.counters import Counters
from sgl_hq.launch.load_ab.figures import Amount, Reading, figure_rows
from sgl_hq.launch.load_ab.phase_amounts import ArmFacts, cache, duration_s, latency, memory, per_request
from sgl_hq.launch.load_ab.sampler import Series

if TYPE_CHECKING:
    from sgl_hq.launch.load_ab.requests_file import RequestSet


@dataclass(frozen=True)
class Drive:
    """How the requests were sent. concurrency: most in flight; rate: requests a second, None: as places become free."""

    concurrency: int
    rate: float | None
    repeat: int


def request_facts(requests: RequestSet, sha256: str) -> dict[str, Any]:
    """What rows keep of a request file: its header, its digest, and whether answers may end early."""
    return requests.header() | {"requests_sha256": sha256, "stops": any(r.stop for r in requests.requests)}


def run_row(
    arm: ArmFacts,
    requests: dict[str, Any],
    drive: Drive,
    results: Sequence[dict[str, Any]],
    series: Series,
    counters: Counters,
    scores: Sequence[float] | None = None,
) -> dict[str, Any]:
    """The row of one phase.

    Args:
        requests: `request_facts`.
        results: of each request, in the file's order: ttft_s, latency_s, output_tokens, prompt_tokens, cached_tokens,
            start_s, text, error (None or empty: answered).
        counters: what passed during the phase.
        scores: 0 or 1 for each answer; None for a workload without right answers.

    A request that failed makes the row a failed one; its figures are those of the answered requests. Raises AccountsError
    when server and client disagree about what was answered.
    """
    done = [r for r in results if not r["error"]]
    failure = _failure(results, requests["requests"])
    if not done:
        return failed_row(arm.arm, requests, drive, failure)
    if failure is None:
        _check_server_agrees(done, counters)
    lists = per_request(done)
    amounts = (
        memory(arm, done, series)
        | cache(requests, done, counters)
        | latency(lists, done)
        | {
            "task_score": Amount(None if scores is None else float(np.mean(scores)), (Reading.SCORES,)),
            "requests_failed": Amount(requests["requests"] - len(done), (Reading.ERRORS,)),
        }
    )
    return _head(arm.arm, requests, drive, failure) | {
        "load": _load(requests, drive) | {"output_tokens": sum(r["output_tokens"] for r in done), "duration_s": duration_s(done)},
        "figures": figure_rows(amounts),
        "per_request": lists | {"right": list(scores or ())},
        "series": series.as_row(),
    }


def failed_row(arm: str, requests: dict[str, Any], drive: Drive, failure: str) -> dict[str, Any]:
    """A row that states why there is nothing to compare. failure: one sentence."""
    return _head(arm, requests, drive, failure) | {
        "load": _load(requests, drive) | {"output_tokens": None, "duration_s": None},
        "figures": {},
        "per_request": {name: [] for name in ("ttft_ms", "tpot_ms", "e2e_ms", "prompt_tokens", "cached_tokens", "right")},
        "series": {name: [] for name in ("t_s", "kv_bytes_used", "running", "queued")},
    }


def _failure(results: Sequence[dict[str, Any]], requests: int) -> str | None:
    """A sentence when not every request was answered; `requests` is never 0."""
    errors = [r["error"] for r in results if r["error"]]
    unanswered = requests - len(results) + len(errors)
    if not unanswered:
        return None
    first = f"the first one: {errors[0]}" if errors else "the load client gave no result for them"
    return f"{unanswered} of {requests} requests were not answered, {first}"


def _head(arm: str, requests: dict[str, Any], drive: Drive, failure: str | None) -> dict[str, Any]:
    kept = {key: requests[key] for key in ("workload", "kind", "phase", "seed", "requests_sha256")}
    return {"arm": arm} | kept | {"repeat": drive.repeat, "failure": failure}


def _load(requests: dict[str, Any], drive: Drive) -> dict[str, Any]:
    kept = {key: requests[key] for key in ("requests", "context", "prompt_tokens", "ideal_cached_tokens", "stops")}
    return kept | {"concurrency": drive.concurrency, "rate": drive.rate}


def _check_server_agrees(done: Sequence[dict[str, Any]], counters: Counters) -> None:
    """All requests of the phase and no others passed the server, with the tokens that the client was told."""
    told = (len(done), sum(r["prompt_tokens"] for r in done), sum(r["output_tokens"] for r in done))
    counted = (counters.requests, counters.prompt_tokens, counters.output_tokens)
    if told != counted:
        raise AccountsError(
            f"The client had {told} requests, prompt tokens and output tokens, the server's counters say {counted}: "
            "send nothing else to this server during a phase and measure it again"
        )
