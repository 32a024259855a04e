"""README's tables from committed results: `python -m sgl_hq.launch.load_ab.readme_table README.md docs/results [--check]`.

Reads docs/results/ab-*.json and replaces what stands between <!-- ab-table --> and <!-- /ab-table -->; with --check it writes
nothing and ends with 1 where README differs from its rows. Every row stays: those that lose and those that failed.
"""

from __future__ import annotations

import html
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgl_hq.launch.load_ab.report_cells import CACHE, LATENCY, LEGEND, MEMORY, Card, Column, budget_line, cell
from sgl_hq.launch.load_ab.report_losses import loss_sentences
from sgl_hq.launch.load_ab.result_view import Case, ReportError, ResultView

BEGIN, END = "<!-- ab-table -->", "<!-- /ab-table -->"
# The scorecards' columns that README has room for; reuse factor and p are in every memory row.
_SHOWN = {
    MEMORY: (
        "reuse_factor", "packed_fraction", "kv_bytes_allocated", "kv_bytes_used_peak", "host_kv_bytes", "resident_tokens_peak",
        "bytes_per_resident_token", "modelled_gain", "measured_gain", "max_context_tokens",
    ),
    LATENCY: ("requests_s", "output_tok_s", "ttft_ms_p50", "ttft_ms_p99", "tpot_ms_p50", "tpot_ms_p99"),
    CACHE: ("hit_rate", "ideal_hit_rate", "evicted_tokens", "recomputed_tokens", "retractions", "task_score", "requests_failed"),
}  # fmt: skip


def readme_table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: for each result its facts, a table for each scorecard, what failed, and where our arms lose."""
    return "\n\n".join(_one_result(ResultView(result)) for result in results)


def update_readme(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """Raises ReportError where the marks are missing or there is no result."""
    path.write_text(_with_table(path, results), encoding="utf-8")


def is_current(path: Path, results: Sequence[dict[str, Any]]) -> bool:
    """Whether `update_readme` would change nothing; raises the same."""
    return path.read_text(encoding="utf-8") == _with_table(path, results)


def committed_results(folder: Path) -> list[dict[str, Any]]:
    """Every ab-*.json, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("ab-*.json"))]


def _with_table(path: Path, results: Sequence[dict[str, Any]]) -> str:
    if not results:
        raise ReportError("There is no result ab-*.json to make README's tables of: write one with `sgl-hq ab PLAN.yaml --json FILE`")
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ReportError(f"{path.name} has no place for the tables: put the lines {BEGIN} and {END} where they belong")
    return f"{before}{BEGIN}\n{readme_table(results)}\n{END}{after}"


def _one_result(view: ResultView) -> str:
    facts, plan = view.result["facts"], view.result["plan"]
    machine = facts["machine"].get("gpu") or facts["machine"]["cpu"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items() if number)
    where = f"model {Path(plan['model']).name}, {machine}, commit {str(facts['commit'])[:12]}, {versions}, {facts['date'][:10]}"
    parts = [
        f"`{facts['command']}` ({where}).",
        html.escape(f"{budget_line(view)} {LEGEND.format(reference=view.arms[0])}", quote=False),
    ]
    parts += [f"**{card.name}**\n\n{_table(view, card)}" for card in _SHOWN]
    sentences = [f"Failed: {arm}, {where}: {sentence}" for arm, where, sentence in view.failures] + loss_sentences(view)
    parts.append("\n".join(f"- {html.escape(sentence, quote=False)}" for sentence in sentences))
    return "\n\n".join(parts)


def _table(view: ResultView, card: Card) -> str:
    columns = [column for column in card.columns if column.figure in _SHOWN[card]]
    head = ["workload, phase", "arm", *(column.heading for column in columns)]
    lines = [f"| {' | '.join(head)} |", "|---|---" + "|---:" * len(columns) + "|"]
    return "\n".join(lines + [_line(view, case, arm, columns) for case in view.cases for arm in view.arms])


def _line(view: ResultView, case: Case, arm: str, columns: Sequence[Column]) -> str:
    name = f"{arm} (failed)" if view.failure(arm, case) else arm
    cells = [cell(view, arm, case, column) for column in columns]
    texts = [c.value + (f" ({c.ratio})" if c.ratio else "") + (f"<br>{c.interval}" if c.interval else "") for c in cells]
    return f"| {', '.join(case)} | {name} | {' | '.join(texts)} |"


def _main(readme: str, results: str, *options: str) -> int:
    if options not in ((), ("--check",)):
        raise ReportError(f"{' '.join(options)} is not an option here: leave it out, or give --check")
    path, rows = Path(readme), committed_results(Path(results))
    if not options:
        update_readme(path, rows)
    elif not is_current(path, rows):
        print(f"{readme} differs from its rows: run this command again without --check", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
