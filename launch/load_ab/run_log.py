"""The rows of a run as they are measured, on disk, so that a run that was cut off goes on where it ended.

JSON lines beside the result: first what the rows belong to (plan, versions, machine), then the command of each run that measured
something, what each started server held, and one line for each run row. A later line on the same thing counts in place of an earlier one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Key = tuple[str, str, int]  # arm, workload, repeat


class RunLogError(RuntimeError):
    """A file of rows that this run may not add to; the message says why and what to do."""


class RunLog:
    """path: None keeps the rows in memory only. belongs_to: plain JSON values; a file that states others is refused."""

    def __init__(self, path: Path | None, belongs_to: Mapping[str, Any]):
        self._path = path
        self._rows: dict[tuple[Key, str], Row] = {}
        self._held: dict[str, Row] = {}
        self._commands: list[str] = []
        if path is not None and path.exists():
            self._read(path, belongs_to)
        else:
            self._write([{"belongs_to": dict(belongs_to)}])

    @property
    def rows(self) -> list[Row]:
        """The latest of each arm, workload, repeat and phase."""
        return list(self._rows.values())

    @property
    def commands(self) -> list[str]:
        """Of the runs that measured these rows, in order."""
        return list(dict.fromkeys(self._commands))

    @property
    def held(self) -> dict[str, Row]:
        """What the server of each arm held, by arm."""
        return dict(self._held)

    def is_finished(self, arm: str, workload: str, repeat: int, phases: Sequence[str]) -> bool:
        """Every phase has a row, and none failed: what failed is measured again."""
        rows = [self._rows.get(((arm, workload, repeat), phase)) for phase in phases]
        return all(row is not None and row["failure"] is None for row in rows)

    def begun(self, command: str) -> None:
        """A run is about to measure."""
        self._keep({"command": command})
        self._write([{"command": command}])

    def started(self, arm: str, held: Row) -> None:
        self._keep({"held": held | {"arm": arm}})
        self._write([{"held": held | {"arm": arm}}])

    def append(self, rows: Sequence[Row]) -> None:
        """The rows of all phases of one arm, workload and repeat, in one piece."""
        lines = [{"row": row} for row in rows]
        for line in lines:
            self._keep(line)
        self._write(lines)

    def _keep(self, line: Row) -> None:
        if (command := line.get("command")) is not None:
            self._commands.append(command)
        elif (held := line.get("held")) is not None:
            self._held[held["arm"]] = {key: value for key, value in held.items() if key != "arm"}
        else:
            row = line["row"]
            self._rows[(row["arm"], row["workload"], row["repeat"]), row["phase"]] = row

    def _read(self, path: Path, belongs_to: Mapping[str, Any]) -> None:
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            head, *lines = [json.loads(line) for line in whole.splitlines()]
            stated = head["belongs_to"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunLogError(f"{path} does not begin as rows of a load A/B do: give --json another name, or remove it") from error
        if differing := [key for key, value in belongs_to.items() if stated.get(key) != value]:
            was = ", ".join(f"{key} {_short(stated.get(key))} instead of {_short(belongs_to[key])}" for key in differing)
            raise RunLogError(f"{path} holds rows of another run ({was}): give --json another name, or remove it")
        if len(whole) < len(data):
            os.truncate(path, len(whole))  # the last run was cut off within a line
        for line in lines:
            self._keep(line)

    def _write(self, lines: Sequence[Row]) -> None:
        if self._path is None:
            return
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        with self._path.open("a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def log_path(json_path: Path) -> Path:
    """Where the rows of the result `json_path` are kept."""
    return json_path.with_suffix(".runs.jsonl")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
