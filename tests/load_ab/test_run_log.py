"""Rows on disk: a run goes on where it ended, and nothing else is added to."""

from __future__ import annotations

import pytest

from sgl_hq.launch.load_ab.run_log import RunLog, RunLogError, log_path

OWNER = {"plan": "p" * 64, "commit": "abc"}
PHASES = ("cold", "warm")


def row(phase="cold", repeat=0, failure=None, arm="vanilla", value=1):
    return {"arm": arm, "workload": "w", "repeat": repeat, "phase": phase, "failure": failure, "value": value}


def test_rows_and_what_servers_held_come_back(tmp_path):
    path = log_path(tmp_path / "result.json")
    log = RunLog(path, OWNER)
    log.started("vanilla", {"allocated_bytes": 5})
    log.append([row("cold"), row("warm")])
    again = RunLog(path, OWNER)
    assert path.name == "result.runs.jsonl" and again.rows == [row("cold"), row("warm")] and again.held == {"vanilla": {"allocated_bytes": 5}}
    assert again.is_finished("vanilla", "w", 0, PHASES)
    assert not again.is_finished("vanilla", "w", 1, PHASES) and not again.is_finished("hq4", "w", 0, PHASES)


def test_a_phase_that_is_missing_or_failed_is_measured_again_and_the_later_row_counts(tmp_path):
    path = tmp_path / "rows"
    RunLog(path, OWNER).append([row("cold")])
    assert not RunLog(path, OWNER).is_finished("vanilla", "w", 0, PHASES)
    RunLog(path, OWNER).append([row("cold", failure="it ended"), row("warm", failure="it ended")])
    log = RunLog(path, OWNER)
    assert not log.is_finished("vanilla", "w", 0, PHASES)
    log.append([row("cold", value=2), row("warm", value=2)])
    for each in (log, RunLog(path, OWNER)):
        assert each.is_finished("vanilla", "w", 0, PHASES) and [r["value"] for r in each.rows] == [2, 2]


def test_a_line_that_was_cut_off_is_dropped_and_written_over(tmp_path):
    path = tmp_path / "rows"
    RunLog(path, OWNER).append([row("cold"), row("warm")])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    log = RunLog(path, OWNER)
    assert log.rows == [row("cold")]
    log.append([row("warm")])
    assert RunLog(path, OWNER).rows == [row("cold"), row("warm")] and path.read_bytes() == whole


def test_rows_of_another_run_are_refused_by_what_differs(tmp_path):
    path = tmp_path / "rows"
    RunLog(path, OWNER).append([row()])
    before = path.read_bytes()
    with pytest.raises(RunLogError, match='another run .commit abc instead of def.: give --json another name'):
        RunLog(path, OWNER | {"commit": "def"})
    path.with_name("other").write_text("[]\n")
    with pytest.raises(RunLogError, match="does not begin as rows of a load A/B do"):
        RunLog(path.with_name("other"), OWNER)
    assert path.read_bytes() == before


def test_without_a_file_rows_are_kept_for_this_run():
    log = RunLog(None, OWNER)
    log.append([row("cold"), row("warm")])
    assert log.is_finished("vanilla", "w", 0, PHASES)


def test_the_commands_of_all_runs_are_kept_each_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    for command in ("ab --arms a", "ab --arms b", "ab --arms b"):
        RunLog(path, OWNER).begun(command)
    assert RunLog(path, OWNER).commands == ["ab --arms a", "ab --arms b"]
