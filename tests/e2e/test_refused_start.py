"""Bad input: one line with reason and remedy, an exit code that is not 0, nothing left running.

Both ways in: `sgl-hq serve`, which checks before SGLang is imported, and SGLang's own launcher with the plugin.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

SERVE = [str(Path(sys.executable).with_name("sgl-hq")), "serve"]
LAUNCH = [sys.executable, "-m", "sglang.launch_server"]


def _run(command, env=None, timeout=240):
    process = subprocess.run(
        command, env=os.environ | (env or {}), capture_output=True, text=True, timeout=timeout, start_new_session=True
    )
    left = [p for p in psutil.process_iter(["pid", "cmdline"]) if "hq-refused-marker" in " ".join(p.info["cmdline"] or [])]
    assert not left, f"left running: {left}"
    return process


def _expect(process, *reasons):
    assert process.returncode != 0
    lines = [line for line in process.stderr.splitlines() if line.startswith(("sgl_hq:", "sgl-hq:"))]
    assert len(lines) == 1, f"expected one line of ours:\n{process.stderr[-3000:]}"
    for reason in reasons:
        assert reason in lines[0]
    assert "Traceback" not in process.stderr


# A marker in the served name shows up in the command line of every process that might be left behind.
MARK = ["--served-model-name", "hq-refused-marker", "--device", "cpu"]

BAD_OPTIONS = [
    (["--hq-format", "hq66"], ["unknown --hq-format 'hq66'", "choose one of"]),
    (["--hq-format", "hq6", "--hq-packed-fraction", "0"], ["between 0 and 1"]),
    (["--hq-format", "hq6", "--hq-packed-fraction", "1.5"], ["between 0 and 1"]),
    (["--hq-format", "hq6", "--hq-page-size", "48"], ["use 64"]),
    (["--hq-pack", "shared", "--hq-format", "hq6", "--hq-pack", "never"], ["choose one of shared, insert, pressure"]),
]


@pytest.mark.parametrize("options, reasons", BAD_OPTIONS, ids=lambda x: x[-1] if isinstance(x, list) else None)
def test_sgl_hq_serve_refuses(model, options, reasons):
    _expect(_run([*SERVE, "--model-path", str(model), *MARK, *options]), *reasons)


def test_sgl_hq_serve_refuses_an_option_it_does_not_know(model):
    _expect(_run([*SERVE, "--model-path", str(model), *MARK, "--hq-fromat", "hq6"]), "unknown option --hq-fromat")


def test_missing_model_directory(tmp_path):
    for command in (SERVE, LAUNCH):
        _expect(_run([*command, "--model-path", str(tmp_path / "none"), *MARK, "--hq-format", "hq6"]), "does not exist", "sgl-hq demo-model")


def test_port_in_use(model):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        for command in (SERVE, LAUNCH):
            _expect(_run([*command, "--model-path", str(model), "--port", port, *MARK, "--hq-format", "hq6"]), port, "choose another --port")


def test_sglangs_own_launcher_refuses_a_bad_option(model):
    _expect(_run([*LAUNCH, "--model-path", str(model), *MARK, "--hq-format", "hq6", "--hq-packed-fraction", "1.5"]), "between 0 and 1")


def test_sglangs_own_launcher_refuses_a_bad_environment(model):
    process = _run([*LAUNCH, "--model-path", str(model), *MARK], env={"SGLANG_HQ_FORMAT": "hq66"})
    _expect(process, "unknown --hq-format 'hq66'")


def test_an_unsupported_combination(model):
    process = _run([*LAUNCH, "--model-path", str(model), *MARK, "--hq-format", "hq6", "--enable-hierarchical-cache"])
    _expect(process, "HiCache cannot be combined", "drop --enable-hierarchical-cache")


def test_a_lossy_format_without_a_gate_record(model, tmp_path):
    """Neither way in serves what nobody has measured; the sentence is the command to run."""
    for command in (SERVE, LAUNCH):
        process = _run([*command, "--model-path", str(model), *MARK, "--hq-format", "K2V2"], env={"SGLANG_HQ_CACHE": str(tmp_path)})
        _expect(process, "no valid quality gate record", f"sgl-hq gate --model {model} --format K2V2", "--hq-allow-ungated")


def test_random_weights_cannot_have_passed_a_gate(model):
    process = _run([*LAUNCH, "--model-path", str(model), "--load-format", "dummy", *MARK, "--hq-format", "hq6"])
    _expect(process, "--load-format dummy serves random weights", "--hq-allow-ungated")


def test_a_model_with_a_sliding_window(model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 1024}
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    process = _run([*LAUNCH, "--model-path", str(tmp_path), "--load-format", "dummy", *MARK, "--hq-format", "hq6"])
    _expect(process, "MistralForCausalLM attends to a sliding window", "drop the --hq-* options")


def test_another_sglang_version(model, tmp_path):
    """A distribution of that name found first, as after `pip install sglang==0.5.18` into a folder of PYTHONPATH."""
    info = tmp_path / "sglang-0.5.18.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.18\n")
    for command in (SERVE, LAUNCH):
        process = _run([*command, "--model-path", str(model), *MARK, "--hq-format", "hq6"], env={"PYTHONPATH": str(tmp_path)})
        _expect(process, "SGLang 0.5.18 is installed", "install sglang==0.5.17")


BREAK_A_MODULE = """
import sys
from pathlib import Path
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            raise ImportError("broken on purpose")
sys.meta_path.insert(0, Broken())
"""


@pytest.mark.parametrize("name", ["sgl_hq.attention.hq_radix_attention", "sgl_hq.patches.ledger"])
def test_a_plugin_that_fails_to_load_never_serves_vanilla(model, tmp_path, name):
    """SGLang logs plugin errors and goes on; with HQ asked for by the environment it must not get that far."""
    (tmp_path / "sitecustomize.py").write_text(BREAK_A_MODULE.format(name=name))
    env = {"PYTHONPATH": str(tmp_path), "SGLANG_HQ_FORMAT": "hq6"}
    process = _run([*LAUNCH, "--model-path", str(model), *MARK], env=env)
    assert process.returncode != 0
    assert "broken on purpose" in process.stderr and "fired up" not in process.stdout + process.stderr
