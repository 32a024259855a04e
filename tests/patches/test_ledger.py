"""The ledger against the installed SGLang, and the guard that refuses to serve without it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import pkgutil
from pathlib import Path

import pytest

from sgl_hq.patches import probe
from sgl_hq.patches.ledger import LEDGER


def test_every_target_looks_as_the_ledger_says():
    assert probe.check_all() == []


@pytest.mark.parametrize("patch", LEDGER, ids=lambda p: p.target.rsplit(".", 1)[1])
def test_entry_is_complete_and_its_hook_exists(patch):
    assert callable(pkgutil.resolve_name(patch.hook))
    assert patch.kind in {"before", "after", "around", "replace"}
    assert len(patch.why) > 20 and patch.delete_when


def test_every_hook_file_is_in_the_ledger_and_every_entry_has_its_file():
    folder = Path(probe.__file__).parent
    files = {f.stem for f in folder.glob("*.py")} - {"__init__", "ledger", "probe"}
    named = {patch.hook.split(":")[0].removeprefix("sgl_hq.patches.") for patch in LEDGER if "patches" in patch.hook}
    assert files == named


def test_a_changed_signature_is_noticed():
    changed = dataclasses.replace(LEDGER[0], parameters=("self", "parser", "new"))
    assert "expected" in probe.check_patch(changed)


def test_a_vanished_target_is_noticed():
    assert "is gone" in probe.check_patch(dataclasses.replace(LEDGER[0], target="sglang.srt.server_args.ServerArgs.no_such"))
    assert "is gone" in probe.check_patch(dataclasses.replace(LEDGER[0], target="sglang.no_such_module.f"))


@pytest.mark.parametrize("version, reason", [("0.5.23", "supports 0.5.17 only: install sglang==0.5.17"), (None, "not installed")])
def test_another_sglang_version_is_refused(monkeypatch, version, reason):
    def found(_name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError("sglang")
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)
    assert reason in probe.check_version()
    assert len(probe.check_all()) == 1
