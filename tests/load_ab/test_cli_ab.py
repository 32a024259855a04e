"""`sgl-hq ab`: which options go with a plan and which without."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from sgl_hq.launch import ab
from sgl_hq.launch.cli import app
from sgl_hq.launch.load_ab import run as load_run


@pytest.fixture
def called(monkeypatch):
    """What was run: ("waves", keywords) or ("load", arguments)."""
    calls = []
    monkeypatch.setattr(ab, "run", lambda **given: calls.append(("waves", given)) or 0)
    monkeypatch.setattr(load_run, "run", lambda *given: calls.append(("load", given)) or 0)
    return calls


def invoke(*words: str):
    return CliRunner().invoke(app, ["ab", *words], env={"COLUMNS": "200"})


def test_a_plan_is_run_with_what_it_takes(called):
    words = "quick-cpu --json r.json --html p.html --arms a,b --workloads x --together 2 --model m --tokenizer t --commit abc"
    assert invoke(*words.split()).exit_code == 0
    assert called == [("load", ("quick-cpu", Path("r.json"), Path("p.html"), "a,b", "x", 2, "m", Path("t"), "abc"))]


def test_without_a_plan_chats_go_out_in_waves(called):
    assert invoke("--quick", "--arms", "vanilla, exact").exit_code == 0 and invoke().exit_code == 0
    assert [kind for kind, _ in called] == ["waves", "waves"]
    assert called[0][1]["quick"] is True and called[0][1]["arms"] == ["vanilla", "exact"] and called[1][1]["arms"] == ["vanilla", "exact", "hq7"]


@pytest.mark.parametrize("words", ["--quick", "--kv-tokens 99", "--hq-pack insert", "--hq-allow-ungated", "--concurrency 4"])
def test_options_of_the_waves_are_refused_with_a_plan(called, words):
    shown = invoke("quick-cpu", *words.split())
    assert shown.exit_code == 2 and not called
    assert f"{words.split()[0]} cannot be used with a plan" in shown.output


@pytest.mark.parametrize("words", ["--html p.html", "--workloads x", "--together 1", "--tokenizer t", "--commit abc"])
def test_options_of_a_plan_are_refused_without_one(called, words):
    shown = invoke(*words.split())
    assert shown.exit_code == 2 and not called
    assert f"{words.split()[0]} cannot be used without a plan" in shown.output
