"""`sgl-hq ceiling`, `oracle`, `frontier` from the command line to exit codes and JSON rows."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from sgl_hq.lab.errors import LabError
from sgl_hq.lab.oracle_rows import summarize_selector
from sgl_hq.launch.ceiling import RULE, _remarks
from sgl_hq.launch.cli import app
from sgl_hq.launch.oracle import _sentences, _table

from .test_oracle_rows import ROW


@pytest.fixture
def lab(tmp_path):
    """Run a command with --json; (output, the file's object)."""

    def run(*command: str, codes: tuple[int, ...] = (0,)):
        result = CliRunner().invoke(app, [*command, "--json", str(tmp_path / "out.json")])
        assert result.exit_code in codes, result.output
        return result.output, json.loads((tmp_path / "out.json").read_text())

    return run


def refused(*command: str) -> str:
    result = CliRunner().invoke(app, list(command))
    assert result.exit_code not in (0, 3)
    return result.output + str(result.exception)


def test_help_names_the_commands():
    shown = CliRunner().invoke(app, ["--help"]).output
    assert all(command in shown for command in ("ceiling", "oracle", "frontier", "gate"))


@pytest.mark.parametrize("command", ["ceiling", "oracle", "frontier"])
def test_help_loads_neither_torch_nor_sglang(command):
    script = (
        "import sys; from sgl_hq.launch.cli import main; sys.argv = ['sgl-hq', sys.argv[1], '--help']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'sglang'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, command], check=True, stdout=subprocess.DEVNULL)


def test_ceiling_of_a_given_share_states_its_threshold_first(lab):
    said, found = lab("ceiling", "--p-attn", "0.334", "--active", "0.337", "--overhead", "0,0.05,0.1")
    assert said.index(RULE) == 0 < said.index("1.28x      1.21x") < said.index("Open: ")
    row = next(row for row in found["rows"] if row["kind"] == "active")
    assert [round(s, 2) for s in row["speedups"]] == [1.28, 1.21, 1.14] and row["verdict"] == "worth building"
    assert {"commit", "versions", "machine", "date", "threshold", "overheads", "p_attn"} <= set(found)


def test_ceiling_closes_a_target_with_exit_code_3(lab):
    said, found = lab("ceiling", "--p-attn", "0.05", codes=(3,))
    assert "Closed: attention takes 5.0% of a step" in said and {row["verdict"] for row in found["rows"]} == {"closed"}


def test_ceiling_measures_a_model(tiny_model, lab):
    said, found = lab("ceiling", "--model", str(tiny_model), "--context", "2000", "--batch", "8", "--steps", "3", codes=(0, 3))
    assert (found["context_tokens"], found["batch"], len(found["step_s"]), found["device"]) == (2000, 8, 3, "cpu")
    assert 0 < found["p_attn_min"] <= found["p_attn"] <= found["p_attn_max"] < 1 and f"p_attn {found['p_attn']:.3f}" in said
    assert [row["name"] for row in found["rows"] if row["kind"] == "grouping"] == ["2 sharers", "4 sharers"]  # 8 rows: not 16
    assert f"at {found['read_gb_per_s']:.1f} GB/s" in said and found["threads"] >= 1
    assert found["busy_cores"] >= 0


@pytest.mark.parametrize(("busy", "threads", "warned"), [(1.2, 2, True), (0.2, 2, False), (1.2, 1, False)])
def test_ceiling_on_a_busy_machine_is_not_to_be_trusted(busy, threads, warned):
    """Seen: two threads beside other work made p_attn 0.13 where one thread had 0.37, which closes what is open."""
    lines = _remarks({"read_gb_per_s": 3.0, "busy_cores": busy, "threads": threads, "device": "cpu", "p_attn_min": 0.3, "p_attn_max": 0.4})
    assert any("Do not trust" in line for line in lines) is warned


@pytest.mark.parametrize(("least", "most", "unclear"), [(0.13, 0.24, True), (0.2, 0.4, False), (0.01, 0.1, False)])
def test_ceiling_whose_steps_disagree_says_so(least, most, unclear):
    lines = _remarks({"read_gb_per_s": 3.0, "busy_cores": 0, "threads": 1, "device": "cpu", "p_attn_min": least, "p_attn_max": most})
    assert any("Unclear" in line for line in lines) is unclear


def test_ceiling_of_a_shape_needs_no_weights(tiny_model, lab, tmp_path):
    (tmp_path / "shape").mkdir()
    shutil.copy(tiny_model / "config.json", tmp_path / "shape")
    shape = ("ceiling", "--model", str(tmp_path / "shape"), "--context", "500", "--steps", "2")
    _, found = lab(*shape, "--dummy-weights", "--active", "0.01", codes=(0, 3))
    assert (found["model"], found["dummy_weights"], found["kv_bytes"]) == ("shape", True, 2 * 2 * 500 * 2 * 16 * 2)
    assert "cannot load a model" in refused(*shape)
    assert "give a shorter --context" in refused(*shape, "--dummy-weights", "--context", "5000")
    assert "folder with config.json" in refused("ceiling", "--model", str(tmp_path / "none"), "--dummy-weights")


def test_oracle_of_everything_passes_and_of_little_fails(tiny_model, lab):
    command = ("oracle", "--model", str(tiny_model), "--context", "200", "--steps", "4", "--selector")
    said, found = lab(*command, "global_block_mass:f=1:b=64,recent_sink:sink=0:recent=1")
    verdicts = [(s["implementation_verdict"], s["rows_within_bounds"]) for s in found["selectors"]]
    assert verdicts[0] == ("pass", 8) and verdicts[1][0] == "fail"
    everything = [row for row in found["rows"] if row["selector"] == "global_block_mass:f=1:b=64"]
    assert "cannot be built: global_block_mass:f=1:b=64." in said and "Kept every bound at every step: " not in said
    assert [s["oracle"] for s in found["selectors"]] == [True, False]
    assert [(row["text"], row["step"]) for row in everything] == [(t, s) for t in ("wikitext", "code") for s in range(4)]
    assert all(row["within_bounds"] and row["kept_fraction"] == 1 for row in everything)
    said, found = lab(*command, "recent_sink:sink=0:recent=1", codes=(3,))
    assert "Closed: no selector" in said


def test_a_step_within_bounds_is_never_shown_or_written_as_a_pass(lab):
    """15 of 16 steps are fine: nothing that a reader or a program sees says `pass`."""
    from io import StringIO

    from rich.console import Console

    rows = [ROW] * 15 + [type(ROW)(**{**vars(ROW), "mse": 1.0})]
    summaries, screen = [summarize_selector(rows)], StringIO()
    Console(file=screen, width=200).print(_table(summaries))
    lines = _sentences(summaries, {ROW.selector: rows})
    assert "fail" in screen.getvalue() and "15/16" in screen.getvalue() and "pass" not in screen.getvalue()
    assert lines[1].endswith("·" * 15 + "x") and lines[-1].startswith("Closed: ")
    assert not any("pass" in line for line in lines[1:])


def test_frontier_of_a_model_with_absolute_positions(tiny_gpt2, lab, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "frontier.svg"
    command = ("frontier", "--model", str(tiny_gpt2), "--prefix", "128,256", "--steps", "4", "--plot", str(plot))
    said, found = lab(*command, "--format", "hq4,int8,hq6")
    assert [row["format"] for row in found["rows"]] == ["hq4", "hq6", "int8"]
    assert {"output_cos_mean", "score_cos_mean", "mse_max", "stored_bits", "effective_bits"} <= set(found["rows"][0])
    assert "gate_version" not in found  # docs/quality.md is made of the gate's own results
    assert plot.read_text().count("output_cos_mean") and "hq4" in said


def test_oracle_of_a_model_with_absolute_positions(tiny_gpt2, lab):
    _, found = lab("oracle", "--model", str(tiny_gpt2), "--context", "300", "--steps", "3", "--selector", "quest:f=1:b=16")
    assert found["selectors"][0]["implementation_verdict"] == "pass"


def test_refusals(tiny_model, tiny_gpt2, tmp_path):
    tiny, nowhere = ("--model", str(tiny_model)), str(tmp_path / "no" / "out.json")
    assert "between 0 and 1" in refused("ceiling", "--p-attn", "2")
    assert "give --active fractions" in refused("ceiling", *tiny, "--active", "3")
    assert "no list of numbers" in refused("ceiling", "--overhead", "much")
    assert "there is no directory" in refused("ceiling", *tiny, "--json", nowhere)
    assert "there is no directory" in refused("oracle", *tiny, "--json", nowhere)
    assert "context is 4096 tokens, --context and the steps need 5001" in refused("ceiling", *tiny, "--context", "5000")
    assert "give a shorter --context" in refused("oracle", *tiny, "--context", "5000")
    assert "there is no selector h2o" in refused("oracle", *tiny, "--selector", "h2o:f=1")
    assert "cannot load a model" in refused("oracle", "--model", str(tmp_path))
    assert "give a shorter --prefix" in refused("frontier", "--model", str(tiny_gpt2), "--prefix", "512", "--format", "hq4")
    assert "multiples of 64" in refused("frontier", *tiny, "--prefix", "100")
    assert "multiple of 64, this model's is 16" in refused("frontier", *tiny, "--format", "hq4,kivi4", "--prefix", "64")
    assert "Reference formats" in refused("frontier", *tiny, "--format", "hq99")
    assert issubclass(LabError, RuntimeError) and LabError.__module__.startswith("sgl_hq.")  # so that users see one sentence
