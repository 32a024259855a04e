"""One arm: its server is checked, its counter probed, then every workload is measured on it, phase by phase."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sgl_hq.launch.ab_compare import ABError
from sgl_hq.launch.ab_progress import START_STEPS, ABProgress
from sgl_hq.launch.bench_facts import BenchError
from sgl_hq.launch.bench_model import BenchModel
from sgl_hq.launch.kv_accounts import AccountsError
from sgl_hq.launch.load_ab.arms import BF16_BITS, Arm
from sgl_hq.launch.load_ab.budget import check_started
from sgl_hq.launch.load_ab.capacity import max_context_tokens
from sgl_hq.launch.load_ab.counter_probe import empty_cache, probe_server, send_one
from sgl_hq.launch.load_ab.counters import read_counters
from sgl_hq.launch.load_ab.load_client import RequestsClient, Results, is_open_loop
from sgl_hq.launch.load_ab.phase_amounts import ArmFacts
from sgl_hq.launch.load_ab.refusals import Incomparable
from sgl_hq.launch.load_ab.requests_file import RequestSet, write
from sgl_hq.launch.load_ab.run_log import RunLog
from sgl_hq.launch.load_ab.run_row import Drive, failed_row, request_facts, run_row
from sgl_hq.launch.load_ab.sampler import Sampler, Series
from sgl_hq.launch.load_ab.score_gsm8k import score
from sgl_hq.launch.server_process import ServerFailed, ServerProcess

Row = dict[str, Any]
# What a broken server or a figure that may not be used looks like; anything else is a bug of ours and ends the run.
FAILURES = (ServerFailed, BenchError, ABError, AccountsError, Incomparable)
WARM_UP_ROUNDS = 2  # the second one finds the first one's prefixes: packing and reading packed pages compile, too


@dataclass(frozen=True)
class PhaseFile:
    """The requests of one phase and the file that holds them."""

    requests: RequestSet
    path: Path
    sha256: str


@dataclass(frozen=True)
class Case:
    """One workload in one repeat. phases: in the order in which they are sent."""

    workload: str
    repeat: int
    phases: tuple[PhaseFile, ...]


@dataclass(frozen=True)
class Conditions:
    """What is the same in all arms. concurrency: requests in flight; rate: requests a second, None: as places become free."""

    model: BenchModel
    concurrency: int
    rate: float | None
    folder: Path

    def drive(self, requests: RequestSet, repeat: int) -> Drive:
        """In an open loop nothing limits what is in flight but the number of requests."""
        concurrency = len(requests.requests) if is_open_loop(requests, self.rate) else self.concurrency
        return Drive(concurrency, self.rate, repeat)


def measure_arm(
    arm: Arm, server: ServerProcess, not_started: BaseException | None, cases: Sequence[Case], conditions: Conditions,
    client: RequestsClient, log: RunLog, progress: ABProgress,
) -> None:  # fmt: skip
    """Measure `cases` and log their rows; what cannot be measured becomes rows with the reason.

    not_started: why the server did not start, None when it did.
    """
    left = list(cases)
    try:
        if not_started is not None:
            raise not_started
        progress.step(START_STEPS)
        progress.note(f"{arm.name}: server ready after {server.start_s:.0f} s")
        arm_facts = _prepared(arm, server, cases[0], conditions, client, log, progress)
        progress.step(START_STEPS)
        while left:
            log.append(_case(arm, arm_facts, server, left[0], conditions, client, progress))
            left.pop(0)
    except FAILURES as error:
        progress.note(f"{arm.name}: {error}")
        for case in left:
            log.append(_failed(arm, case, conditions, error))


def _prepared(
    arm: Arm, server: ServerProcess, case: Case, conditions: Conditions, client: RequestsClient, log: RunLog, progress: ABProgress
) -> ArmFacts:
    """Check the budget, probe the counter, find the longest prompt, compile what compiles at first use."""
    progress.doing(f"{arm.name}: checking the server")
    held, hq = check_started(arm, server)
    log.started(arm.name, held.as_row())
    probe_server(server, arm.token_bytes, hq)
    longest = max_context_tokens(server)
    progress.doing(f"{arm.name}: warming up")
    requests = case.phases[-1].requests
    first = tuple(replace(request, at_s=None) for request in requests.requests[: conditions.concurrency])
    warm_up = replace(requests, requests=first, context=None, ideal_cached_tokens=0)
    path = conditions.folder / "warm-up.jsonl"
    write(warm_up, path)
    for _ in range(WARM_UP_ROUNDS):
        client.send(server, warm_up, path, conditions.model, conditions.concurrency, None)
    server.freeze_gc()
    return ArmFacts(
        arm=arm.name,
        allocated_bytes=held.allocated_bytes,
        token_bytes=arm.token_bytes,
        bf16_token_bytes=arm.bf16_token_bytes,
        stored_bits=hq["stored_bits_per_value"] if hq else BF16_BITS,
        max_context_tokens=longest,
    )


def _case(
    arm: Arm, facts: ArmFacts, server: ServerProcess, case: Case, conditions: Conditions, client: RequestsClient, progress: ABProgress
) -> list[Row]:
    """The rows of all phases, after emptying the cache once; failed ones where the server still lives. Raises ServerFailed."""
    rows = []
    try:
        empty_cache(server.flush_cache, lambda tokens: send_one(server, tokens))
        for phase in case.phases:
            progress.doing(f"{arm.name}: {case.workload}, {phase.requests.phase}, repeat {case.repeat}")
            rows.append(_phase(arm, facts, server, phase, conditions, case.repeat, client))
            progress.step(START_STEPS)
    except FAILURES as error:
        server.check_alive()
        progress.note(f"{arm.name}, {case.workload}: {error}")
        return _failed(arm, case, conditions, error)
    answered, seconds = sum(row["load"]["requests"] for row in rows), sum(row["load"]["duration_s"] or 0 for row in rows)
    progress.note(f"{arm.name}, {case.workload}, repeat {case.repeat}: {answered} requests in {seconds:.0f} s")
    return rows


def _phase(
    arm: Arm, facts: ArmFacts, server: ServerProcess, phase: PhaseFile, conditions: Conditions, repeat: int, client: RequestsClient
) -> Row:
    requests, drive = phase.requests, conditions.drive(phase.requests, repeat)
    before = read_counters(server.metrics(), _hq(server))
    began = time.perf_counter()
    with Sampler(server, arm.token_bytes) as sampler:
        results = client.send(server, requests, phase.path, conditions.model, drive.concurrency, conditions.rate)
    counters = read_counters(server.metrics(), _hq(server)).since(before)
    series = while_under_load(sampler.series, results, began)
    return run_row(facts, request_facts(requests, phase.sha256), drive, results, series, counters, _scores(requests, results))


def while_under_load(series: Series, results: Results, began: float) -> Series:
    """The samples from just before the first request to just after the last answer, in seconds since the first of them.

    The generator reads its file before and sums up after them, seconds in which nothing happens. began: when the series did, on
    the clock of the results.
    """
    first = min(result["start_s"] for result in results) - began
    last = max(result["start_s"] + result["latency_s"] for result in results) - began
    times = [moment.t_s for moment in series.moments]
    begin = max((t for t in times if t <= first), default=times[0])
    end = min((t for t in times if t >= last), default=times[-1])
    kept = [moment for moment in series.moments if begin <= moment.t_s <= end]
    return replace(series, moments=tuple(moment._replace(t_s=moment.t_s - begin) for moment in kept))


def _hq(server: ServerProcess) -> Row | None:
    return server.server_info()["internal_states"][0].get("hq")


def _scores(requests: RequestSet, results: Results) -> list[int] | None:
    """Of the answered requests that have a right answer; None for a workload without."""
    pairs = [(r["text"], q.answer) for q, r in zip(requests.requests, results) if q.answer is not None and not r["error"]]
    return [score(text, answer) for text, answer in pairs] or None


def _failed(arm: Arm, case: Case, conditions: Conditions, error: BaseException) -> list[Row]:
    reason = without_folders(str(error).splitlines()[0])
    return [
        failed_row(arm.name, request_facts(phase.requests, phase.sha256), conditions.drive(phase.requests, case.repeat), reason)
        for phase in case.phases
    ]


def without_folders(text: str) -> str:
    """Absolute paths cut to their last name: rows are published."""
    return re.sub(r"(?<![\w.:/])/(?:[\w.+-]+/)+", "", text)
