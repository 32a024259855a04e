"""`sgl-hq bench serve`: whole servers under SGLang's load generator, vanilla and ours, in one run on one GPU.

Every arm is a server of its own with the same KV bytes and the same waves. Arms: bench_arms.py. Workloads and goals:
bench_workloads.py.
"""

from __future__ import annotations

import importlib.util
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgl_hq.config import HQConfig, from_env
from sgl_hq.launch import pool_check
from sgl_hq.launch.ab_compare import VANILLA, ABError, plugin_block
from sgl_hq.launch.bench_arms import DEFAULT_ARMS, QUICK_ARMS, Arm, parse_arms
from sgl_hq.launch.bench_client import LoadClient
from sgl_hq.launch.bench_facts import BenchError, bench_facts, check_json_path, write_rows
from sgl_hq.launch.bench_model import BenchModel, real_model, shape_with_dummy_weights
from sgl_hq.launch.bench_progress import Steps
from sgl_hq.launch.bench_serve_report import judge, show
from sgl_hq.launch.bench_workloads import PACKS, QUICK_WORKLOADS, WARM_UP, WORKLOADS, Workload, figures, parse_workloads
from sgl_hq.launch.kv_accounts import AccountsError, resident_dense_tokens
from sgl_hq.launch.pool_check import allocated_bytes, check_backend
from sgl_hq.launch.server_log import full_batch_step_ms, logged_batches, mean_running
from sgl_hq.launch.server_process import ServerFailed, ServerProcess
from sgl_hq.launch.server_settings import MEASURED, ON_GPU, START_TIMEOUT_S
from sgl_hq.launch.signals import terminated_like_interrupted
from sgl_hq.page_format import PAGE_TOKENS

Row = dict[str, Any]


@dataclass(frozen=True)
class Session:
    """One server and the workloads it answers. pack: the policy that they ask for; vanilla serves all of them."""

    arm: Arm
    pack: str
    workloads: tuple[Workload, ...]


@dataclass(frozen=True)
class Setup:
    """What all servers of a run have in common; kv_tokens: KV byte budget of each, in bfloat16 tokens."""

    model: BenchModel
    kv_tokens: int
    packed_fraction: float | str
    repeats: int = 1

    def server(self, session: Session, log: Path) -> ServerProcess:
        """The process, not started."""
        args = [*self.model.server_args, *session.arm.server_args(self.kv_tokens, session.pack, self.packed_fraction)]
        args += [*MEASURED, *ON_GPU]
        return ServerProcess(self.model.path, args, cpu=False, log_path=log, start_timeout_s=START_TIMEOUT_S, stop_grace_s=0)


def run(
    workloads: str | None = None,
    arms: str | None = None,
    model: str | None = None,
    tokenizer: Path | None = None,
    kv_tokens: int | None = None,
    packed_fraction: float | str = HQConfig.packed_fraction,
    pack: str | None = None,
    together: int = 1,
    repeats: int = 3,
    json_path: Path | None = None,
    quick: bool = False,
    commit: str | None = None,
) -> int:
    """Measure every arm on every workload, print the tables, write `json_path`; rows of what ended well are always written.

    pack: one policy for all workloads, so that an arm needs one server; None: what each workload asks for.
    together: servers started at the same time on the one GPU; they are measured one after another, the others idle.
    repeats: of every workload; its figures are medians.
    Returns 0, or 1 when an arm could not be measured. Raises BenchError for what cannot be run.
    """
    import torch

    if from_env() is not None:
        raise BenchError("SGLANG_HQ_* options are set: the vanilla arms would inherit them; unset them, the arms set their own")
    chosen_arms = parse_arms(arms or (QUICK_ARMS if quick else DEFAULT_ARMS))
    chosen = parse_workloads(workloads or (QUICK_WORKLOADS if quick else ",".join(WORKLOADS)))
    if pack not in (None, *PACKS):
        raise BenchError(f"--hq-pack: {pack!r} is unknown: choose from {', '.join(PACKS)}")
    chosen = [load.under(pack or load.pack) for load in chosen]
    check_json_path(json_path)
    if not torch.cuda.is_available():
        raise BenchError("No CUDA device here: `sgl-hq bench serve` needs one; `sgl-hq ab` compares on a CPU")
    folder = Path(tempfile.mkdtemp(prefix="sgl-hq-bench-"))  # kept when an arm fails: the message names the logs
    (folder / "model").mkdir()
    bench_model = real_model(model, tokenizer) if model else shape_with_dummy_weights(folder / "model", tokenizer)
    setup = Setup(bench_model, kv_tokens or max(load.kv_tokens for load in chosen), packed_fraction, repeats)
    rows: list[Row] = []
    facts = bench_facts(commit) | {"model": bench_model.name, "kv_tokens": setup.kv_tokens, "packed_fraction": packed_fraction}
    todo = []
    for session in sessions(chosen_arms, chosen):
        if missing := missing_backend(session.arm):
            rows.extend(_row(session, load, failure=missing, skipped=True) for load in session.workloads)
        else:
            todo.append(session)
    try:
        with terminated_like_interrupted():
            measure(setup, todo, together, folder, rows)
    finally:
        judge(rows)
        if json_path is not None:
            write_rows(rows, facts, json_path)
        show(rows, facts, bench_model.token_bytes)
    failed = any(row["failure"] and not row.get("skipped") for row in rows)
    if not failed:
        shutil.rmtree(folder)
    return int(failed)


def missing_backend(arm: Arm) -> str | None:
    """Why this environment cannot serve the arm's backend, found without importing it."""
    if arm.backend != "fa3":
        return None
    spec = importlib.util.find_spec("sgl_kernel")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    return None if folder and any(folder.glob("flash_ops*")) else "sgl_kernel's flash_ops (FlashAttention-3) is not installed here"


def sessions(arms: Sequence[Arm], workloads: Sequence[Workload]) -> list[Session]:
    """One server for each arm and packing policy that its workloads ask for; arms that pack nothing need one."""
    out = []
    for arm in arms:
        policies = dict.fromkeys(load.pack for load in workloads) if arm.packs else [workloads[0].pack]
        for pack in policies:
            mine = tuple(load for load in workloads if not arm.packs or load.pack == pack)
            out.append(Session(arm, pack, mine))
    return out


def measure(setup: Setup, todo: Sequence[Session], together: int, folder: Path, rows: list[Row]) -> None:
    """Start `together` servers, measure one after another, stop them, go on; a broken arm becomes rows with the reason."""
    steps = Steps(sum(2 + len(session.workloads) for session in todo))
    with LoadClient(folder) as client:
        for first in range(0, len(todo), together):
            with ExitStack() as stack:
                batch = todo[first : first + together]
                servers = [setup.server(s, folder / f"server-{first + i}-{s.arm.name.replace('/', '-')}.log") for i, s in enumerate(batch)]
                for server in servers:
                    stack.callback(server.stop)
                with ThreadPoolExecutor(len(batch)) as starting:
                    started = [starting.submit(server.start) for server in servers]
                for session, server, start in zip(batch, servers, started):
                    _measure_session(setup, session, server, start.exception(), client, rows, steps)
                    server.stop()  # the next one is measured without it


def _measure_session(
    setup: Setup, session: Session, server: ServerProcess, failed: BaseException | None, client: LoadClient,
    rows: list[Row], steps: Steps,
) -> None:  # fmt: skip
    name, left = f"{session.arm.name}, {session.pack}", list(session.workloads)
    try:
        if failed is not None:
            raise failed
        steps.done(f"{name}: server ready, {server.start_s:.0f} s after its start")
        check_pool(setup, session.arm, server)
        for wave in WARM_UP:
            client.run(server, wave, setup.model.path, setup.model.tokenizer)
        server.freeze_gc()
        steps.done(f"{name}: warmed up")
        while left:
            rows.append(measure_workload(setup, session, left[0], server, client, setup.repeats))
            steps.done(f"{name}: {left.pop(0).name}")
    except (ServerFailed, BenchError, ABError, AccountsError) as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        rows.extend(_row(session, load, failure=str(error).splitlines()[0]) for load in left)


def check_pool(setup: Setup, arm: Arm, server: ServerProcess) -> None:
    """The arm is what it says, and its KV pool has the budget.

    Raises BenchError, or ABError when HQ is active in a vanilla arm or absent in one of ours.
    """
    hq = _hq(server, arm)
    check_backend(arm.name, server.server_info(), arm.backend)
    budget, slots = setup.kv_tokens * setup.model.token_bytes, setup.kv_tokens * arm.bytes_divisor
    pool_check.check_pool(arm.name, server.metrics(), hq, slots, budget, arm.kv_dtype)


def measure_workload(
    setup: Setup, session: Session, load: Workload, server: ServerProcess, client: LoadClient, repeats: int = 1
) -> Row:
    """The workload's row: every figure is the median over `repeats`, each from an empty cache on; all of TPOT's and TTFT's are kept."""
    runs = [_measure_once(setup, session, load, server, client) for _ in range(repeats)]
    medians = {key: _median([run[key] for run in runs]) for key in runs[0]}
    every = {f"{key}_of_each": [run[key] for run in runs] for key in ("tpot_ms", "ttft_ms", "step_ms_full")}
    return _row(session, load, **medians, **every, repeats=repeats, start_s=server.start_s)


def _median(values: Sequence[float | None]) -> float | None:
    """None if a value is missing. The mean of the two in the middle of an even number: the lower one flatters latencies."""
    return None if None in values else statistics.median(values)


def _measure_once(setup: Setup, session: Session, load: Workload, server: ServerProcess, client: LoadClient) -> Row:
    """Empty the cache, prime, then the measured wave. Counters are differences over the measured wave."""
    files = setup.model.path, setup.model.tokenizer
    server.flush_cache()
    if load.priming is not None:
        client.run(server, load.priming, *files)
    before, logged = _counters(_hq(server, session.arm, session.pack)), len(server.log_text())
    result = client.run(server, load.wave, *files)
    hq = _hq(server, session.arm, session.pack)  # the scheduler answers, so its log is complete
    log = server.log_text()[logged:]
    measured = figures(result) | _memory(setup, session.arm, server, hq) | _batches(log, load.wave.requests)
    return measured | {key: value - before[key] for key, value in _counters(hq).items()}


def _batches(log: str, requests: int) -> dict[str, float | int | None]:
    """What the scheduler did with a wave of `requests`: with these figures equal, times of two arms compare like with like."""
    prefills = sum(batch[0] == "prefill" for batch in logged_batches(log))
    return {"step_ms_full": full_batch_step_ms(log, requests), "running_mean": mean_running(log), "prefill_batches": prefills}


def _hq(server: ServerProcess, arm: Arm, pack: str | None = None) -> dict[str, Any] | None:
    """The `hq` block, after checking that HQ is active or absent as the arm says (ABError otherwise)."""
    info = server.server_info()
    if pack is None and not arm.is_vanilla:
        pack = info["internal_states"][0].get("hq", {}).get("pack")
    return plugin_block(arm.format or VANILLA, info, pack or "")


def _counters(hq: dict[str, Any] | None) -> dict[str, int]:
    names = ("packed_tokens_read", "packed_tokens_attended")
    return {name: hq["counters"][name] if hq else 0 for name in names}


def _memory(setup: Setup, arm: Arm, server: ServerProcess, hq: dict[str, Any] | None) -> dict[str, int]:
    """What is resident when the wave has ended: cached, no request running. Bytes and tokens."""
    samples = server.metrics()
    dense_tokens = resident_dense_tokens(samples)
    dense_bytes = dense_tokens * setup.model.token_bytes // arm.bytes_divisor
    return {
        "kv_bytes_used": dense_bytes + (hq["packed"]["bytes_used"] if hq else 0),
        "kv_bytes_allocated": allocated_bytes(samples, hq),
        "dense_tokens": dense_tokens,
        "packed_tokens": hq["packed"]["pages_used"] * PAGE_TOKENS if hq else 0,
    }


def _row(session: Session, load: Workload, failure: str | None = None, **measured: Any) -> Row:
    arm = session.arm
    names = {"arm": arm.name, "format": arm.format, "backend": arm.backend, "kv_dtype": arm.kv_dtype}
    pack = session.pack if arm.packs else None
    return names | {"workload": load.name, "about": load.about, "pack": pack, "failure": failure} | measured
