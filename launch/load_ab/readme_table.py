"""Tables from committed results: `python -m sgl_hq.launch.load_ab.readme_table README.md docs [--check]`.

Reads docs/results/ab-*.json. Replaces what stands between <!-- ab-table --> and <!-- /ab-table --> in README by its most asked columns,
and writes docs/ab.md with all of them, and those of docs/results/older besides; with --check it writes nothing and ends with 1 where
either differs from its rows. Every row stays in both: those that lose and those that failed.
"""

from __future__ import annotations

import html
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgl_hq.launch.load_ab.report_cells import CARDS, LEGEND, Column, budget_line, cell
from sgl_hq.launch.load_ab.report_losses import loss_sentences
from sgl_hq.launch.load_ab.result_view import Case, ReportError, ResultView

BEGIN, END = "<!-- ab-table -->", "<!-- /ab-table -->"
PAGE = "ab.md"
# README's columns; reuse factor and p are in every memory row.
_ASKED_MOST = frozenset({
    "reuse_factor", "packed_fraction", "kv_bytes_used_peak", "host_kv_bytes", "resident_tokens_peak", "bytes_per_resident_token",
    "requests_s", "output_tok_s", "ttft_ms_p50", "tpot_ms_p50", "hit_rate", "recomputed_tokens", "task_score",
})  # fmt: skip

_CELLS = "In brackets: ratio to {reference}. Every column, what was allocated and how, and where our arms lose: [docs/ab.md](docs/ab.md)."


def readme_table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: for each result its command and the columns asked for most."""
    return "\n\n".join(_short(ResultView(result)) for result in results)


def full_page(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: for each result its facts, every column of the three scorecards, what failed, and where our arms lose."""
    head = "# The load A/B, every figure\n\nMade by `python -m sgl_hq.launch.load_ab.readme_table README.md docs` from `docs/results/ab-*.json`, then from `docs/results/older`."
    return "\n\n".join([head, *(_whole(ResultView(result)) for result in results)]) + "\n"


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


def _short(view: ResultView) -> str:
    budget = f"Equal KV bytes: {view.result['equal_bytes']['budget_bytes'] / 1e6:,.1f} MB an arm."
    parts = [_origin(view), f"{budget} {_ours(view)} {_CELLS.format(reference=view.arms[0])}"]
    parts += [f"**{card.name}**\n\n{_table(view, [c for c in card.columns if c.figure in _ASKED_MOST])}" for card in CARDS]
    return "\n\n".join([*parts, _list(_gaps(view))]).rstrip()


def _whole(view: ResultView) -> str:
    about = f"{budget_line(view)} {LEGEND.format(reference=view.arms[0])}"
    parts = [f"## {', '.join(view.workloads)}", html.escape(view.result["plan"]["about"], quote=False), _origin(view)]
    parts += [html.escape(about, quote=False)] + [f"### {card.name}\n\n{_table(view, card.columns)}" for card in CARDS]
    return "\n\n".join([*parts, _list(_gaps(view) + loss_sentences(view))])


def _ours(view: ResultView) -> str:
    """How our arms were served, of their arguments those that begin with --hq-."""
    told = []
    for arm in view.ours:
        words = view.result["equal_bytes"]["arms"][arm]["args"]
        first = next(i for i, word in enumerate(words) if word.startswith("--hq-"))
        told.append(f"{arm} `{' '.join(words[first:])}`")
    return f"Our arms: {', '.join(told)}." if told else ""


def _gaps(view: ResultView) -> list[str]:
    failed = [f"Failed: {arm}, {where}: {sentence}" for arm, where, sentence in view.failures]
    return failed + [f"Not run: {arm}, {where}" for arm, where in view.left_out]


def _list(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {html.escape(sentence, quote=False)}" for sentence in sentences)


def _origin(view: ResultView) -> str:
    facts, plan = view.result["facts"], view.result["plan"]
    machine = facts["machine"].get("gpu") or facts["machine"]["cpu"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items() if number)
    commit, dash, state = str(facts["commit"]).partition("-")  # a checkout with changes says so
    where = f"model {Path(plan['model']).name}, {machine}, commit {commit[:12]}{dash}{state}, {versions}, {facts['date'][:10]}"
    return f"`{facts['command']}` ({where})."


def _table(view: ResultView, columns: Sequence[Column]) -> str:
    head = ["workload, phase", "arm", *(column.heading for column in columns)]
    lines = [f"| {' | '.join(head)} |", "|---|---" + "|---:" * len(columns) + "|"]
    return "\n".join(lines + [_line(view, case, arm, columns) for case in view.cases for arm in view.arms if view.was_run(arm, case)])


def _line(view: ResultView, case: Case, arm: str, columns: Sequence[Column]) -> str:
    name = f"{arm} (failed)" if view.failure(arm, case) else arm
    cells = [cell(view, arm, case, column) for column in columns]
    texts = [c.value + (f" ({c.ratio})" if c.ratio else "") + (f"<br>{c.interval}" if c.interval else "") for c in cells]
    return f"| {', '.join(case)} | {name} | {' | '.join(texts)} |"


def _main(readme: str, docs: str, *options: str) -> int:
    if options not in ((), ("--check",)):
        raise ReportError(f"{' '.join(options)} is not an option here: leave it out, or give --check")
    path, page, folder = Path(readme), Path(docs) / PAGE, Path(docs) / "results"
    rows = committed_results(folder)
    whole = full_page(rows + committed_results(folder / "older"))
    if not options:
        update_readme(path, rows)
        page.write_text(whole, encoding="utf-8")
        return 0
    current = {path: is_current(path, rows), page: page.is_file() and page.read_text(encoding="utf-8") == whole}
    for differing in (each for each, same in current.items() if not same):
        print(f"{differing} differs from its rows: run this command again without --check", file=sys.stderr)
    return int(not all(current.values()))


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
