"""A result in the terminal: for each workload and phase one table of memory, one of latency, one of the cache and answers.

Where a terminal is narrower than a table, the table goes on below with its next columns; nothing is cut.
"""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sgl_hq.launch.load_ab.report_cells import CARDS, LEGEND, Card, Column, budget_line, cell, load_line
from sgl_hq.launch.load_ab.report_losses import loss_sentences
from sgl_hq.launch.load_ab.result_view import Case, ResultView

WIDE = 1000  # characters: wider than any table


def show(result: dict[str, Any], console: Console | None = None) -> None:
    """Print all of it, to stdout by default."""
    view, console = ResultView(result), console or Console()
    width = console.width if console.is_terminal else WIDE
    _say(console, budget_line(view))
    _say(console, LEGEND.format(reference=view.arms[0]))
    for case in view.cases:
        console.print()
        console.rule(Text(", ".join(case), style="bold"), align="left")
        _say(console, load_line(view, case))
        for card in CARDS:
            for part in tables(view, case, card, width):
                Console(file=console.file, width=WIDE).print(part)
    for arm, where, sentence in view.failures:
        _say(console, f"FAILED: {arm}, {where}: {sentence}")
    for arm, where in view.left_out:
        _say(console, f"Not run: {arm}, {where}")
    for sentence in loss_sentences(view):
        _say(console, sentence)


def tables(view: ResultView, case: Case, card: Card, width: int) -> list[Table]:
    """One row for every arm, failed ones too; as many tables as it takes to stay within `width` characters."""
    kept = card.columns[: card.kept]
    parts = [[*kept]]
    for column in card.columns[card.kept :]:
        if len(parts[-1]) > card.kept and _width(_table(view, case, card.name, [*parts[-1], column])) > width:
            parts.append([*kept])
        parts[-1].append(column)
    return [_table(view, case, f"{card.name}, continued" if number else card.name, part) for number, part in enumerate(parts)]


def _table(view: ResultView, case: Case, title: str, columns: list[Column]) -> Table:
    out = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    out.add_column("arm", no_wrap=True)
    out.add_column("repeats", justify="right", no_wrap=True)
    for column in columns:
        out.add_column(_broken(column.heading), justify="right", no_wrap=True)
    for arm in (arm for arm in view.arms if view.was_run(arm, case)):
        cells = [cell(view, arm, case, column) for column in columns]
        texts = [Text(f"{c.value} {c.ratio}".strip() + (f"\n{c.interval}" if c.interval else "")) for c in cells]
        repeats = len(view.runs(arm, case))
        out.add_row(Text(arm if repeats else f"{arm} FAILED"), str(repeats), *texts)
    return out


def _width(shown: Table) -> int:
    return Console(width=WIDE).measure(shown).maximum


def _broken(heading: str) -> str:
    """The heading over several lines, so that columns are as wide as their figures."""
    lines = [""]
    for word in heading.split():
        lines = [*lines[:-1], f"{lines[-1]} {word}".strip()] if len(lines[-1]) + len(word) < 14 else [*lines, word]
    return "\n".join(line for line in lines if line)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False)
