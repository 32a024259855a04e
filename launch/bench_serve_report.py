"""From measured waves to ratios, verdicts and two kinds of tables: latency and memory, never in one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from sgl_hq.config import EXACT
from sgl_hq.launch.bench_workloads import WORKLOADS, better

Row = dict[str, Any]
SAME_BATCH = 0.1  # arms whose mean decode batches differ by more do not do the same work a step
RATIOS = ("tpot_ms", "ttft_ms", "output_tok_s")


def judge(rows: Sequence[Row]) -> None:
    """Add to every measured row its ratios to the best vanilla arm of the same workload, metric by metric, and verdicts.

    A ratio is larger where the row is better. Vanilla with FP8 KV loses bits, so it is compared with and not the reference.
    """
    for row in rows:
        if row["failure"]:
            continue
        same = [r for r in rows if r["workload"] == row["workload"] and r["format"] is None and not r["failure"]]
        bf16 = [r for r in same if r["kv_dtype"] == "auto"]
        fp8 = [r for r in same if r["kv_dtype"] != "auto"]
        for metric in RATIOS:
            row[f"{metric}_vs_vanilla"] = _ratio(metric, bf16, row)
            row[f"{metric}_vs_fp8"] = _ratio(metric, fp8, row)
        row["goals"] = _verdicts(row)


def _ratio(metric: str, references: Sequence[Row], row: Row) -> float | None:
    """To the best of `references`, None without one."""
    ratios = [better(metric, reference[metric], row[metric]) for reference in references]
    return min((ratio for ratio in ratios if ratio is not None), default=None)


def _verdicts(row: Row) -> list[dict[str, Any]]:
    """The workload's goals for an arm of ours. `exact` packs nothing: it answers for workloads where nothing is packed."""
    load = WORKLOADS[row["workload"]]
    if row["format"] is None or (row["format"] == EXACT and load.prime):
        return []
    found = []
    for goal in load.goals:
        ratio = row[f"{goal.metric}_vs_vanilla"]
        verdict = "no vanilla arm" if ratio is None else "met" if ratio >= goal.at_least else "missed"
        found.append({"metric": goal.metric, "at_least": goal.at_least, "ratio": ratio, "verdict": verdict})
    return found


def show(rows: Sequence[Row], facts: dict[str, Any], token_bytes: int) -> None:
    """All tables on stdout, never cut; then what could not be measured."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    budget = facts["kv_tokens"] * token_bytes / 1e9
    print(f"{facts['machine']['gpu']}; commit {facts['commit']}; {versions}")
    print(f"{facts['model']}; KV budget of every arm {budget:.1f} GB ({facts['kv_tokens']:,} bfloat16 tokens), CUDA graphs on")
    print("Running: requests in a decode step, mean. Times count from when all requests of a wave wait in the scheduler's queue.")
    print("Vanilla with SGLang's default page size. Ratios are to the best vanilla arm in bfloat16 of this run, larger is better.")
    for name in dict.fromkeys(row["workload"] for row in rows):
        mine = [row for row in rows if row["workload"] == name and not row["failure"]]
        if mine:
            _print(_table(f"{name}, latency: {mine[0]['about']}", _LATENCY, mine))
            if problem := unequal_batches(mine):
                print(f"WARNING, {name}: {problem}")
            _print(_table(f"{name}, memory, when the wave has ended, and reuse during it", _MEMORY, mine))
    for row in rows:
        if row["failure"]:
            print(f"{row['workload']}, {row['arm']}: {'not measured' if row.get('skipped') else 'FAILED'}: {row['failure']}")


def unequal_batches(rows: Sequence[Row]) -> str | None:
    """Why times of these arms do not compare like with like, or None. What the scheduler never logged is not compared."""
    running = {row["arm"]: row["running_mean"] for row in rows if row["running_mean"]}
    if not running or max(running.values()) <= (1 + SAME_BATCH) * min(running.values()):
        return None
    counts = ", ".join(f"{arm} {mean:.0f}" for arm, mean in running.items())
    return f"the arms decoded different numbers of requests at a time ({counts}): compare full-batch steps only"


def _table(title: str, columns: Sequence[tuple[str, Callable[[Row], str]]], rows: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for number, (heading, _) in enumerate(columns):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(cell(row) for _, cell in columns))
    return table


def _print(table: Table) -> None:
    console = Console()
    Console(width=max(console.width, Console(width=1000).measure(table).maximum)).print(table)


def _number(key: str, digits: int = 1, unit: float = 1) -> Callable[[Row], str]:
    return lambda row: "-" if row[key] is None else f"{row[key] / unit:,.{digits}f}"


def _times(key: str) -> Callable[[Row], str]:
    return lambda row: "-" if row[key] is None else f"{row[key]:.2f}x"


def _goals(row: Row) -> str:
    return "; ".join(f"{goal['metric'].removesuffix('_ms')} >= {goal['at_least']:.2f}x {goal['verdict']}" for goal in row["goals"])


def _reuse(row: Row) -> str:
    read = row["packed_tokens_read"]
    return f"{row['packed_tokens_attended'] / read:.1f}" if read else "-"


_LATENCY = (
    ("arm", lambda row: row["arm"]),
    ("TPOT ms", _number("tpot_ms", 2)),
    ("p99", _number("tpot_ms_p99", 2)),
    ("full-batch step ms", _number("step_ms_full", 2)),
    ("running", _number("running_mean", 0)),
    ("prefills", _number("prefill_batches", 0)),
    ("ITL ms", _number("itl_ms", 2)),
    ("p99", _number("itl_ms_p99", 2)),
    ("TTFT ms", _number("ttft_ms", 0)),
    ("p99", _number("ttft_ms_p99", 0)),
    ("out tok/s", _number("output_tok_s", 0)),
    ("in tok/s", _number("input_tok_s", 0)),
    ("req/s", _number("requests_s", 2)),
    ("TPOT vs best", _times("tpot_ms_vs_vanilla")),
    ("TPOT vs fp8", _times("tpot_ms_vs_fp8")),
    ("TTFT vs best", _times("ttft_ms_vs_vanilla")),
    ("tok/s vs best", _times("output_tok_s_vs_vanilla")),
    ("goals", _goals),
)
_MEMORY = (
    ("arm", lambda row: row["arm"]),
    ("prompt tokens", _number("prompt_tokens", 0)),
    ("cached", _number("cached_tokens", 0)),
    ("dense tokens", _number("dense_tokens", 0)),
    ("packed tokens", _number("packed_tokens", 0)),
    ("KV used MB", _number("kv_bytes_used", 0, 1e6)),
    ("KV allocated MB", _number("kv_bytes_allocated", 0, 1e6)),
    ("packed tokens read", _number("packed_tokens_read", 0)),
    ("attended", _number("packed_tokens_attended", 0)),
    ("attended / read", _reuse),
)
