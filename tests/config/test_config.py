"""Options: every bad one is refused with a sentence that names the remedy; none is dropped."""

from __future__ import annotations

import pytest

from sgl_hq.config import AUTO, HQConfig, HQConfigError, from_env


def test_nothing_asked_for_means_inactive():
    assert from_env({}) is None


def test_environment_round_trip():
    for config in (HQConfig("hq6", "insert", 0.25), HQConfig("hq6", allow_ungated=True), HQConfig("hq6", audit=16, audit_raise=True)):
        assert from_env(config.to_env()) == config
    assert from_env({"SGLANG_HQ_FORMAT": "int8"}) == HQConfig("int8", "shared", AUTO, 64)


@pytest.mark.parametrize(
    "env, reason",
    [
        ({"SGLANG_HQ_FORMAT": "hq66"}, "unknown --hq-format 'hq66': choose one of exact, bf16"),
        ({"SGLANG_HQ_FORMAT": "sink64-K6V5"}, r"unknown --hq-format 'sink64-K6V5'.*with n in 1\.\.63"),
        ({"SGLANG_HQ_FORMAT": "K6V9"}, "unknown --hq-format 'K6V9'.*k, v in 2..8, for example sink4-K5V4"),
        ({"SGLANG_HQ_FORMAT": "hq6", "SGLANG_HQ_PACK": "always"}, "choose one of shared, insert, pressure"),
        ({"SGLANG_HQ_FORMAT": "hq6", "SGLANG_HQ_PACKED_FRACTION": "0"}, "between 0 and 1"),
        ({"SGLANG_HQ_FORMAT": "hq6", "SGLANG_HQ_PACKED_FRACTION": "1.5"}, "between 0 and 1"),
        ({"SGLANG_HQ_FORMAT": "hq6", "SGLANG_HQ_PACKED_FRACTION": "nan"}, "between 0 and 1"),
        ({"SGLANG_HQ_FORMAT": "hq6", "SGLANG_HQ_PACKED_FRACTION": "half"}, "is not a number"),
        ({"SGLANG_HQ_FORMAT": "hq6", "SGLANG_HQ_PAGE_SIZE": "48"}, "use 64"),
        ({"SGLANG_HQ_PACK": "insert"}, "add --hq-format"),
        ({"SGLANG_HQ_ALLOW_UNGATED": "1"}, "add --hq-format"),
        ({"SGLANG_HQ_FORMAT": "hq6", "SGLANG_HQ_AUDIT": "often"}, "--hq-audit 'often' is not a number: give for example 16"),
        ({"SGLANG_HQ_FORMAT": "hq6", "SGLANG_HQ_AUDIT": "-1"}, "give for example 16, or 0"),
        ({"SGLANG_HQ_FORMAT": "hq6", "SGLANG_HQ_AUDIT_RAISE": "1"}, "add --hq-audit"),
        ({"SGLANG_HQ_FORMAT": "hq6", "SGLANG_HQ_ALLOW_UNGATED": "maybe"}, "set it to 1 or unset it"),
        ({"SGLANG_HQ_FROMAT": "hq6"}, "unknown environment variable SGLANG_HQ_FROMAT"),
    ],
)
def test_bad_options_are_refused(env, reason):
    with pytest.raises(HQConfigError, match=reason):
        from_env(env)


@pytest.mark.parametrize("name", ["lossless", "hq2", "K6tV5", "sink63-K2V8"])
def test_presets_and_family_names_are_formats(name):
    assert from_env({"SGLANG_HQ_FORMAT": name}) == HQConfig(name)


def test_exact_packs_nothing():
    assert not HQConfig("exact").packs and HQConfig("bf16").packs
