"""`sgl-hq serve` only resolves: what it starts SGLang with, and what it refuses."""

from __future__ import annotations

import pytest

from sgl_hq.config import HQConfigError
from sgl_hq.launch.port_claim import PortClaim
from sgl_hq.launch.serve import resolve


@pytest.fixture
def args(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return ["--model-path", str(tmp_path), "--port", str(PortClaim().port)]


def test_defaults_on_a_cpu_lose_no_bit_and_select_our_platform(args):
    argv, env, config = resolve(args, {}, has_gpu=False)
    assert config.format == env["SGLANG_HQ_FORMAT"] == "bf16"
    assert env["SGLANG_PLATFORM"] == "sgl_hq_cpu" and argv[argv.index("--device") + 1] == "cpu"


def test_defaults_on_a_gpu_touch_no_page_and_leave_the_platform_alone(args):
    argv, env, config = resolve(args, {}, has_gpu=True)
    assert config.format == "exact" and "SGLANG_PLATFORM" not in env and "--device" not in argv


def test_flags_win_over_the_environment_and_the_rest_goes_through_unchanged(args):
    environ = {"SGLANG_HQ_FORMAT": "int8", "SGLANG_HQ_PACK": "insert", "HOME": "/h"}
    options = ["--hq-format", "hq6", "--tp-size", "1", "--hq-allow-ungated", "--trust-remote-code"]
    argv, env, config = resolve([*args, *options], environ, has_gpu=False)
    assert (config.format, config.pack, config.allow_ungated) == ("hq6", "insert", True)
    assert env["SGLANG_HQ_FORMAT"] == "hq6" and env["SGLANG_HQ_ALLOW_UNGATED"] == "1" and env["HOME"] == "/h"
    assert argv[:3] == ["--tp-size", "1", "--trust-remote-code"] and not any(a.startswith("--hq-") for a in argv)


@pytest.mark.parametrize(
    "environ, reason",
    [
        ({"SGLANG_PLATFORM": "npu"}, "SGLANG_PLATFORM=npu makes SGLang skip this plugin"),
        ({"SGLANG_PLUGINS": "other"}, "add sgl_hq to it"),
        ({"SGLANG_HQ_PACKED_FRACTION": "2"}, "between 0 and 1"),
    ],
)
def test_settings_that_would_serve_something_else_are_refused(args, environ, reason):
    with pytest.raises(HQConfigError, match=reason):
        resolve(args, environ, has_gpu=False)


@pytest.mark.parametrize(
    "options, reason",
    [
        ([], "quality gate"),
        (["--load-format", "dummy"], "--load-format dummy serves random weights"),
        (["--json-model-override-args", '{"rope_theta": 1}'], "--json-model-override-args changes the model"),
    ],
)
def test_a_lossy_format_without_a_passed_gate_is_refused(args, options, reason):
    """Before SGLang is imported; the three ways in which nothing is known."""
    with pytest.raises(HQConfigError, match=reason) as refused:
        resolve([*args, *options, "--hq-format", "hq6"], {}, has_gpu=False)
    assert "--hq-allow-ungated" in str(refused.value)
    argv, _, _ = resolve([*args, *options], {"SGLANG_HQ_FORMAT": "hq6", "SGLANG_HQ_ALLOW_UNGATED": "1"}, has_gpu=False)
    assert argv[: len(options)] == options


def test_a_plugin_list_that_names_us_is_fine(args):
    resolve(args, {"SGLANG_PLUGINS": "other, sgl_hq"}, has_gpu=False)


def test_a_misspelt_option_is_not_passed_on(args):
    with pytest.raises(HQConfigError, match="unknown option --hq-packed"):
        resolve([*args, "--hq-packed", "0.5"], {}, has_gpu=False)
