"""What `ceiling`, `oracle` and `frontier` have in common: the model, progress on stderr, tables and a JSON file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from sgl_hq.json_file import write_json
from sgl_hq.lab.errors import LabError
from sgl_hq.launch.run_facts import run_facts

MEASURED, CLOSED = 0, 3  # exit codes: something may be worth building; nothing is


def model_or_demo(model: str | None) -> str:
    if model is not None:
        return model
    from sgl_hq.launch.demo_model import ensure_demo_model

    return str(ensure_demo_model())


def check_folder(path: Path | None, option: str) -> None:
    """Before the minutes of measuring, not after them. Raises LabError."""
    if path is not None and not path.resolve().parent.is_dir():
        raise LabError(f"{option}: there is no directory {path.resolve().parent}")


@contextmanager
def progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[int], None]]]:
    """Yields (say, advance). say: what begins now, on a terminal beside a bar with the time left, else as a line.
    advance: called with costs that add up to `total`."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, speed_estimate_period=600) as bars:
        task = bars.add_task("loading the model", total=total)

        def say(what: str) -> None:
            bars.update(task, description=what)
            if not console.is_terminal:
                console.print(f"{bars.tasks[0].percentage:3.0f} %  {what}", highlight=False, markup=False)

        yield say, lambda cost: bars.advance(task, cost)


def show(title: str, table: Table, lines: list[str]) -> None:
    """On stdout, never cut, also in a file."""
    console = Console()
    console.width = max(console.width, Console(width=1000).measure(table).maximum)
    console.print(title, style="bold", highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def write_result(lab: str, facts: dict[str, Any], began: float, json_path: Path | None) -> None:
    """facts: plain values without infinities, rows among them. began: of time.monotonic()."""
    if json_path is not None:
        head = {"lab": lab, "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "seconds": round(time.monotonic() - began, 1)}
        write_json(head | run_facts() | facts, json_path)
