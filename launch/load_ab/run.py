"""`sgl-hq ab PLAN`: the whole load A/B, from the plan to tables, JSON and page.

plan.py, arms.py and budget.py say what is started, session.py what is measured on each server, refusals.py what may not be
compared, run_log.py how an interrupted run goes on.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, get_args

from sgl_hq import json_file
from sgl_hq.config import from_env
from sgl_hq.launch.ab_progress import START_STEPS, ABProgress
from sgl_hq.launch.bench_facts import bench_facts, check_json_path
from sgl_hq.launch.bench_model import BenchModel, real_model, shape_with_dummy_weights
from sgl_hq.launch.load_ab.arms import Arm, make_arms
from sgl_hq.launch.load_ab.budget import Held, budget_bytes, budget_tokens, how_equal
from sgl_hq.launch.load_ab.load_client import RequestsClient
from sgl_hq.launch.load_ab.plan import DEMO, DUMMY, Plan, PlanError, load_plan, select
from sgl_hq.launch.load_ab.requests_file import Phase, write
from sgl_hq.launch.load_ab.run_log import Row, RunLog, log_path
from sgl_hq.launch.load_ab.session import Case, Conditions, PhaseFile, measure_arm
from sgl_hq.launch.load_ab.summary import summarize
from sgl_hq.launch.load_ab.workloads import request_sets
from sgl_hq.launch.server_process import ServerProcess
from sgl_hq.launch.signals import terminated_like_interrupted


def run(
    plan_name: str,
    json_path: Path | None = None,
    html_path: Path | None = None,
    arms: str | None = None,
    workloads: str | None = None,
    together: int = 1,
    model: str | None = None,
    tokenizer: Path | None = None,
    commit: str | None = None,
) -> int:
    """Measure what of the plan is not measured yet, show the tables, write result and page.

    json_path: the rows are kept beside it as they are measured; without it an interrupted run begins anew.
    arms, workloads: names from the plan, comma-separated: only these are measured in this run; the result has all that were.
    together: servers started at the same time; they are measured one after another, the others idle.
    model, tokenizer: in place of the plan's. commit: where this is a copy of a checkout.

    Returns 0, or 1 when something could not be measured. Raises PlanError and other errors of ours for what cannot be run, and
    Incomparable for rows that may not be compared: they are kept beside `json_path`, and no result is written.
    """
    if from_env() is not None:
        raise PlanError("SGLANG_HQ_* options are set: the arms without a format would inherit them; unset them, the arms set their own")
    plan = _overridden(load_plan(plan_name), model, tokenizer)
    chosen_arms = select("arms", arms, [arm.name for arm in plan.arms])
    chosen_loads = select("workloads", workloads, [spec.name for spec in plan.specs()])
    for path in (json_path, html_path):
        check_json_path(path)
    if html_path is not None:
        from sgl_hq.launch.load_ab import report_html  # noqa: F401  what it needs is missed now, not after hours
    with ExitStack() as undo:
        folder = Path(tempfile.mkdtemp(prefix="sgl-hq-ab-"))
        undo.callback(shutil.rmtree, folder)
        bench_model = _model(plan, folder)
        all_arms = make_arms(plan.arms, budget_bytes(plan, bench_model), bench_model, _on_cpu(plan))
        facts = bench_facts(commit) | {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        log = RunLog(json_path and log_path(json_path), _belongs_to(plan, bench_model, facts))
        cases = _cases(plan, chosen_loads, bench_model, folder)
        undo.pop_all()  # from here on it is kept when something fails: the messages name the logs
    conditions = Conditions(bench_model, plan.concurrency, plan.rate, folder)
    todo = [(arm, _unfinished(arm, cases, log)) for arm in all_arms if arm.name in chosen_arms]
    if any(open_cases for _, open_cases in todo):
        log.begun(facts["command"])
    with terminated_like_interrupted():
        _measure(todo, conditions, together, log, len(cases))
    result = _result(plan, bench_model, all_arms, facts, log)
    _show(result, json_path, html_path)
    failed = any(row["failure"] for row in result["runs"])
    if not failed:
        shutil.rmtree(folder)
    return int(failed)


def _overridden(plan: Plan, model: str | None, tokenizer: Path | None) -> Plan:
    given = {"model": model, "tokenizer": tokenizer}
    return plan.model_copy(update={key: value for key, value in given.items() if value is not None})


def _model(plan: Plan, folder: Path) -> BenchModel:
    """What all servers load. folder: gets the files of a model without weights."""
    if plan.model == DUMMY:
        (folder / "model").mkdir()
        return shape_with_dummy_weights(folder / "model", plan.tokenizer)
    if plan.model != DEMO:
        return real_model(plan.model, plan.tokenizer)
    from sgl_hq.launch.demo_model import ensure_demo_model

    return real_model(str(ensure_demo_model()), plan.tokenizer)


def _on_cpu(plan: Plan) -> bool:
    import torch

    has_gpu = torch.cuda.is_available()
    if plan.device == "cuda" and not has_gpu:
        raise PlanError("The plan asks for device cuda and there is none here: run it where there is one, or a plan for the CPU")
    return plan.device == "cpu" or not has_gpu


def _belongs_to(plan: Plan, model: BenchModel, facts: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for rows to stand in one result."""
    machine = {key: facts["machine"][key] for key in ("cpu", "cores", "gpu")}
    return {"plan": plan.digest(), "model": model.name, "versions": facts["versions"], "commit": facts["commit"], "machine": machine}


def _cases(plan: Plan, workloads: Sequence[str], model: BenchModel, folder: Path) -> list[Case]:
    """The requests files, made once for all arms: equal arguments make equal files, also in a run that goes on."""
    from transformers import AutoTokenizer

    tokenizer, tokens = AutoTokenizer.from_pretrained(model.tokenizer), budget_tokens(plan, model)
    cases = []
    for repeat in range(plan.repeats):
        for spec in plan.specs():
            if spec.name not in workloads:
                continue
            phases = []
            for requests in request_sets(spec, tokenizer, plan.seed + repeat, tokens):
                if requests.phase in spec.phases:
                    path = folder / f"{spec.name}-{requests.phase}-{repeat}.jsonl"
                    phases.append(PhaseFile(requests, path, write(requests, path)))
            cases.append(Case(spec.name, repeat, tuple(phases)))
    return cases


def _unfinished(arm: Arm, cases: Sequence[Case], log: RunLog) -> list[Case]:
    return [
        case for case in cases if not log.is_finished(arm.name, case.workload, case.repeat, [p.requests.phase for p in case.phases])
    ]


def _measure(
    todo: Sequence[tuple[Arm, list[Case]]], conditions: Conditions, together: int, log: RunLog, cases_of_an_arm: int
) -> None:
    """Start `together` servers, measure one after another, stop each when it is done, go on."""
    open_arms = [(arm, cases) for arm, cases in todo if cases]
    longest = max((sum(len(case.phases) for case in cases) for _, cases in open_arms), default=0)
    with ABProgress(len(open_arms), START_STEPS * (1 + longest)) as progress, ExitStack() as stack:
        for arm, cases in todo:
            if len(cases) < cases_of_an_arm:
                progress.note(f"{arm.name}: {cases_of_an_arm - len(cases)} of {cases_of_an_arm} workloads and repeats were measured before")
        if not open_arms:
            return
        client = stack.enter_context(RequestsClient(conditions.folder))
        for first in range(0, len(open_arms), together):
            batch = open_arms[first : first + together]
            progress.doing(f"{', '.join(arm.name for arm, _ in batch)}: starting")
            servers = [arm.server(conditions.model, conditions.folder / f"server-{arm.name}.log") for arm, _ in batch]
            servers[0].on_wait = progress.starting
            with _started(servers) as reasons:
                for (arm, cases), server, reason in zip(batch, servers, reasons):
                    measure_arm(arm, server, reason, cases, conditions, client, log, progress)
                    server.stop()  # the next one is measured without it


@contextmanager
def _started(servers: Sequence[ServerProcess]) -> Iterator[list[BaseException | None]]:
    """Servers started at the same time: for each, why it did not start. All of them are stopped on every way out."""
    with ExitStack() as stack:
        starting = stack.enter_context(ThreadPoolExecutor(len(servers)))
        for server in servers:
            stack.callback(server.stop)  # before the pool is left, which waits for starts that are under way
        yield [start.exception() for start in [starting.submit(server.start) for server in servers]]


def _result(plan: Plan, model: BenchModel, arms: Sequence[Arm], facts: dict[str, Any], log: RunLog) -> dict[str, Any]:
    """All rows in the plan's order. Raises Incomparable."""
    orders = [[arm.name for arm in arms], [spec.name for spec in plan.specs()], get_args(Phase)]
    keys = ("arm", "workload", "phase")
    rows: list[Row] = sorted(log.rows, key=lambda row: (*(o.index(row[k]) for o, k in zip(orders, keys)), row["repeat"]))
    held = {arm.name: Held(**log.held[arm.name]) for arm in arms if arm.name in log.held}
    return {
        "facts": facts | {"model": model.name, "command": " && ".join(log.commands)},
        "plan": plan.describe(),
        "equal_bytes": {
            "budget_bytes": arms[0].budget_bytes,
            "how": how_equal(arms, held),
            "arms": {name: facts.as_row() for name, facts in held.items()},
        },
        "runs": rows,
        "summary": summarize(rows),
    }


def _show(result: dict[str, Any], json_path: Path | None, html_path: Path | None) -> None:
    from sgl_hq.launch.load_ab.report_tables import show

    if json_path is not None:
        json_file.write_json(result, json_path)
    show(result)
    if html_path is not None:
        from sgl_hq.launch.load_ab.report_html import write_html

        write_html(result, html_path)
