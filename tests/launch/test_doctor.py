"""The doctor finds what it is there to find. SGLang itself is loaded once, in `test_this_environment`."""

from __future__ import annotations

import importlib.metadata as metadata
import io
import types

import pytest
from rich.console import Console

from sgl_hq.launch import demo_model, doctor
from sgl_hq.launch.doctor import Check


def states(rows: list[Check]) -> dict[str, str]:
    return {row.name: row.state for row in rows}


def test_this_environment(monkeypatch, tmp_path):
    """Where the suite runs nothing may need a fix. The demo model is of no concern: an empty cache is a note."""
    monkeypatch.setenv("SGLANG_HQ_CACHE", str(tmp_path))
    rows = doctor.checks()
    assert [row for row in rows if row.state == "fix"] == []
    assert states(rows)["demo model"] == "note"


@pytest.mark.parametrize("state, code", [("ok", 0), ("note", 0), ("fix", 1)])
def test_exit_code(monkeypatch, state, code):
    monkeypatch.setattr(doctor, "checks", lambda: [Check("a", "ok", "x"), Check("b", state, "list[int]", "do [this]")])
    shown = io.StringIO()
    assert doctor.run(Console(file=shown, width=120)) == code
    assert "list[int]" in shown.getvalue() and "do [this]" in shown.getvalue()


@pytest.mark.parametrize(
    "version, state", [((3, 10, 9), "fix"), ((3, 11, 0), "ok"), ((3, 13, 5), "ok"), ((3, 14, 0), "fix")]
)
def test_python(monkeypatch, version, state):
    monkeypatch.setattr(doctor.sys, "version_info", version)
    assert doctor.python().state == state


@pytest.mark.parametrize("version, state", [("0.5.17", "ok"), ("0.5.17.post1", "fix"), ("0.5.23", "fix")])
def test_sglang_version(monkeypatch, version, state):
    monkeypatch.setattr(metadata, "version", lambda _: version)
    assert doctor.sglang_version().state == state


def test_sglang_missing(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert (doctor.sglang_version().state, doctor.sglang_version().found) == ("fix", "not installed")


PLUGIN = metadata.EntryPoint("sgl_hq", "sgl_hq.plugin:register", "sglang.srt.plugins")
PLATFORM = metadata.EntryPoint("sgl_hq_cpu", "sgl_hq.platform_cpu:activate", "sglang.srt.platforms")
SECOND_PLATFORM = metadata.EntryPoint("sgl_hq_gpu", "sgl_hq.platform_gpu:activate", "sglang.srt.platforms")
OTHERS = metadata.EntryPoint("ascend", "ascend.plugin:register", "sglang.srt.plugins")


@pytest.mark.parametrize(
    "listed, expected",
    [
        ([PLUGIN, PLATFORM], ["ok", "ok"]),
        ([PLUGIN, PLATFORM, OTHERS], ["ok", "ok"]),
        ([PLATFORM], ["fix", "ok"]),
        ([PLUGIN], ["ok", "fix"]),
        ([PLUGIN, PLATFORM, SECOND_PLATFORM], ["ok", "fix"]),
        ([OTHERS], ["fix", "fix"]),
    ],
)
def test_entry_points(monkeypatch, listed, expected):
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point for point in listed if point.group == group])
    assert [row.state for row in doctor.entry_points()] == expected


def test_packages_load_from_any_other_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert states(doctor.packages()) == {"sgl_hq imported from": "ok", "packages": "ok"}


def test_a_folder_that_hides_the_installed_package_is_found(monkeypatch, tmp_path):
    """`python -m sglang.launch_server` started beside a folder named sgl_hq imports that one instead."""
    (tmp_path / "sgl_hq").mkdir()
    (tmp_path / "sgl_hq" / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)
    rows = {row.name: row for row in doctor.packages()}
    assert rows["sgl_hq imported from"].state == "fix"
    assert rows["sgl_hq imported from"].found == str(tmp_path / "sgl_hq" / "__init__.py")


def test_a_package_that_raises_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("sgl_hq", "sgl_hq.no_such_leaf"))
    rows = {row.name: row for row in doctor.packages()}
    assert rows["packages"].state == "fix" and rows["packages"].found.startswith(
        "sgl_hq.no_such_leaf: ModuleNotFoundError"
    )


def probe_saying(monkeypatch, answer):
    module = types.ModuleType("sgl_hq.patches.probe")
    module.check_all = answer
    monkeypatch.setitem(doctor.sys.modules, module.__name__, module)


def test_patch_problems_are_shown(monkeypatch):
    probe_saying(monkeypatch, lambda: ["Scheduler.abort_request: signature differs"])
    assert (doctor.patch_targets().state, doctor.patch_targets().found) == (
        "fix",
        "Scheduler.abort_request: signature differs",
    )


def test_a_probe_that_raises_is_a_row_not_a_traceback(monkeypatch):
    def broken():
        raise ImportError("libcuda.so.1")

    probe_saying(monkeypatch, broken)
    assert (doctor.patch_targets().state, doctor.patch_targets().found) == ("fix", "ImportError: libcuda.so.1")


def test_memory_is_a_note_only(monkeypatch):
    monkeypatch.setattr(doctor, "MEMORY_GB", 10**6)
    assert doctor.memory().state == "note"


def test_full_disk_matters_only_while_the_model_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("SGLANG_HQ_CACHE", str(tmp_path / "not" / "yet"))
    assert doctor.disk().state == "ok"
    monkeypatch.setattr(doctor, "DISK_GB", 10**9)
    assert doctor.disk().state == "fix"
    monkeypatch.setattr(demo_model, "is_ready", lambda _: True)
    assert doctor.disk().state == "ok"
    assert doctor.demo().state == "ok"
