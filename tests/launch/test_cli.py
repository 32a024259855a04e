"""The command line: what it passes on, what it prints, how it fails. No server is started here."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sgl_hq import __version__
from sgl_hq.config import HQConfigError
from sgl_hq.launch import cli


def invoke(*args: str):
    return CliRunner().invoke(cli.app, list(args))


@pytest.fixture
def fake_module(monkeypatch):
    """Put a stand-in for a module of `sgl_hq.launch` in place, so that the command's late import finds it."""

    def place(name: str, **attributes):
        module = types.ModuleType(f"sgl_hq.launch.{name}")
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return place


def test_help_names_every_command():
    shown = invoke("--help").output
    for command in ("serve", "ab", "gate", "demo-model", "formats", "top", "doctor"):
        assert command in shown


def test_version():
    result = invoke("--version")
    assert (result.exit_code, result.output) == (0, __version__ + "\n")


@pytest.mark.parametrize("command", ["", "serve", "ab", "gate", "demo-model", "formats", "top", "doctor"])
def test_help_loads_neither_torch_nor_sglang(command):
    script = (
        "import sys; from sgl_hq.launch.cli import main; sys.argv = ['sgl-hq', *sys.argv[1:], '--help']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print('HEAVY', sorted({'torch', 'sglang', 'transformers', 'openai'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script, *command.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("HEAVY []\n")


SGLANG_ARGS = [
    ["--model-path", "some/model", "--hq-format", "hq6", "--port", "30001"],
    ["--model-path=some/model", "--hq-packed-fraction=0.25", "--disable-cuda-graph"],
    ["--tp", "2", "--json-model-override-args", '{"a": -1}', "--mem-fraction-static", "0.5"],
    ["positional", "--enable-metrics", "-x", "y"],
]


@pytest.mark.parametrize("args", SGLANG_ARGS)
def test_serve_passes_everything_on_in_order(fake_module, args):
    seen = []
    fake_module("serve", serve=seen.append)
    result = invoke("serve", *args)
    assert result.exit_code == 0, result.output
    assert seen == [args]


def test_ab_leaves_what_is_not_given_to_the_harness(fake_module):
    seen = {}
    fake_module("ab", run=lambda **given: seen.update(given) or 0)
    assert invoke("ab").exit_code == 0
    assert seen.pop("arms") == ["vanilla", "exact", "hq7"]
    assert seen.pop("quick") is False and seen.pop("allow_ungated") is False
    assert len(seen) == 10 and set(seen.values()) == {None}


def test_ab_passes_every_option(fake_module, tmp_path):
    seen = {}
    fake_module("ab", run=lambda **given: seen.update(given) or 0)
    numbers = {
        "kv_tokens": 4096,
        "concurrency": 8,
        "prefixes": 3,
        "users": 4,
        "prefix_tokens": 900,
        "output_tokens": 16,
    }
    flags = [part for name, value in numbers.items() for part in ("--" + name.replace("_", "-"), str(value))]
    rows = tmp_path / "rows.jsonl"
    result = invoke(
        "ab", "--quick", "--model", "m", "--arms", "vanilla, int8",
        "--hq-pack", "insert", "--hq-packed-fraction", "0.25", "--hq-allow-ungated", "--json", str(rows), *flags,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    expected = {"model": "m", "arms": ["vanilla", "int8"], "quick": True, "pack": "insert", "packed_fraction": 0.25}
    assert seen == expected | numbers | {"json_path": rows, "allow_ungated": True}


@pytest.mark.parametrize("words, module", [(["ab"], "ab"), (["bench", "serve"], "bench_serve")])
def test_memory_may_move_between_the_tiers_in_both_comparisons(fake_module, words, module):
    seen = {}
    fake_module(module, run=lambda **given: seen.update(given) or 0)
    assert invoke(*words, "--hq-packed-fraction", "auto").exit_code == 0 and seen["packed_fraction"] == "auto"
    wrong = invoke(*words, "--hq-packed-fraction", "half")
    assert wrong.exit_code != 0 and "half" in str(wrong.exception or wrong.output)


def test_gate_leaves_what_is_not_given_to_the_harness(fake_module):
    seen = {}
    fake_module("gate", run=lambda **given: seen.update(given) or 0)
    assert invoke("gate").exit_code == 0
    assert (seen.pop("all_presets"), seen.pop("quick"), seen.pop("device")) == (False, False, "cpu")
    assert len(seen) == 8 and set(seen.values()) == {None}


def test_gate_passes_every_option_and_its_exit_code(fake_module, tmp_path):
    seen = {}
    fake_module("gate", run=lambda **given: seen.update(given) or 3)
    result = invoke(
        "gate", "--model", "m", "--format", "hq6, nf4", "--all", "--quick", "--prefix", "64,128", "--steps", "4",
        "--windows", "a", "--windows", "b", "--device", "cuda", "--revision", "r", "--json", "j", "--record-dir", "d",
    )  # fmt: skip
    assert result.exit_code == 3, result.output
    assert seen == {
        "model": "m", "formats": ["hq6", "nf4"], "all_presets": True, "quick": True, "prefixes": [64, 128], "steps": 4,
        "windows": [Path("a"), Path("b")], "device": "cuda", "revision": "r", "json_path": Path("j"), "record_dir": Path("d"),
    }  # fmt: skip


def test_calibrate_passes_its_options(fake_module):
    seen = []
    fake_module("calibrate", run=lambda *given: seen.append(given) or 0)
    assert invoke("calibrate").exit_code == 0 and invoke("calibrate", "--model", "m", "--device", "cuda").exit_code == 0
    assert seen == [(None, "cpu"), ("m", "cuda")]


@pytest.mark.parametrize("code", [0, 3])
def test_ab_exit_code_is_the_harness_verdict(fake_module, code):
    fake_module("ab", run=lambda **_: code)
    assert invoke("ab").exit_code == code


@pytest.mark.parametrize(
    "args", [["ab", "--kv-tokens", "0"], ["ab", "--concurency", "4"], ["ab", "--users", "x"], ["sreve"]]
)
def test_bad_usage_is_refused(fake_module, args):
    fake_module("ab", run=lambda **_: 0)
    assert invoke(*args).exit_code == 2


def run_main(monkeypatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["sgl-hq", *args])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


def test_expected_error_is_one_line_on_stderr(fake_module, monkeypatch, capfd):
    def refuse(_):
        raise HQConfigError("unknown --hq-format 'x': choose one of exact, hq6")

    fake_module("serve", serve=refuse)
    assert run_main(monkeypatch, "serve", "--hq-format", "x") == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "sgl-hq: unknown --hq-format 'x': choose one of exact, hq6\n"


def test_a_bug_keeps_its_traceback(fake_module, monkeypatch):
    def broken(_):
        raise KeyError("bug")

    fake_module("serve", serve=broken)
    monkeypatch.setattr(sys, "argv", ["sgl-hq", "serve"])
    with pytest.raises(KeyError):
        cli.main()


def test_demo_model_refuses_an_unknown_name(monkeypatch, capfd):
    assert run_main(monkeypatch, "demo-model", "--model", "gpt-5") == 1
    assert "Choose one of: smollm2" in capfd.readouterr().err
