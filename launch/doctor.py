"""`sgl-hq doctor`: is this installation able to serve, and if not, what to do. Each check is one small function."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sgl_hq.launch import demo_model
from sgl_hq.patches.ledger import SUPPORTED_SGLANG

PYTHONS = ((3, 11), (3, 12), (3, 13))
# What SGLang asks `importlib.metadata` for; one platform entry only, see pyproject.toml.
ENTRY_POINTS = {
    "sglang.srt.plugins": {"sgl_hq": "sgl_hq.plugin:register"},
    "sglang.srt.platforms": {"sgl_hq_cpu": "sgl_hq.platform_cpu:activate"},
}
PACKAGES = (
    "sgl_hq",
    "sgl_hq.pool",
    "sgl_hq.metrics",
    "sgl_hq.audit",
    "sgl_hq.cache",
    "sgl_hq.attention",
    "sgl_hq.platform_cpu",
    "sgl_hq.gate",
    "sgl_hq.calibration",
    "sgl_hq.baselines",
    "sgl_hq.lab",
    "sgl_hq.kernels",
    "sgl_hq.kernels.page_codec",
    "sgl_hq.kernels.grouped_attention",
    "sgl_hq.patches",
    "sgl_hq.launch",
    "sgl_hq.launch.load_ab",
)  # as in pyproject.toml; tests/layout/test_packaging.py compares
MEMORY_GB, DISK_GB = 6, 2  # two servers one after the other with SmolLM2; the demo model while it is converted

# Run with `-c` in the current folder: that folder comes first on the path, as with `python -m sglang.launch_server`.
_IMPORT_ALL = """
import importlib, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.import_module(name).__file__ or ""
    except Exception as error:
        found[name] = f"!{type(error).__name__}: {error}"
print("\\n" + json.dumps(found))
"""


@dataclass(frozen=True)
class Check:
    """One row. state: `ok`, `note` (works, but know it) or `fix` (serving will fail; `remedy` says what to do)."""

    name: str
    state: str
    found: str
    remedy: str = ""


def run(console: Console | None = None) -> int:
    """Print the table; 0 when no row says `fix`, else 1."""
    console = console or Console()
    with console.status("checking (loads SGLang once, 10 to 30 s)"):
        rows = checks()
    table = Table(title="sgl-hq doctor", show_lines=False)
    for column in ("check", "state", "found", "what to do"):
        table.add_column(column, overflow="fold")
    colours = {"ok": "green", "note": "yellow", "fix": "bold red"}
    for row in rows:
        table.add_row(row.name, f"[{colours[row.state]}]{row.state}", escape(row.found), escape(row.remedy))
    console.print(table)
    to_fix = sum(row.state == "fix" for row in rows)
    console.print(f"{to_fix} to fix" if to_fix else "ready: sgl-hq ab --quick")
    return 1 if to_fix else 0


def checks() -> list[Check]:
    """All rows, cheap ones first."""
    return [
        python(),
        sglang_version(),
        *entry_points(),
        *packages(),
        torch_device(),
        patch_targets(),
        memory(),
        disk(),
        demo(),
    ]


def python() -> Check:
    found, version = ".".join(map(str, sys.version_info[:3])), sys.version_info[:2]
    return _check("Python", version in PYTHONS, found, "use Python 3.11, 3.12 or 3.13")


def sglang_version() -> Check:
    try:
        found = metadata.version("sglang")
    except metadata.PackageNotFoundError:
        found = "not installed"
    remedy = f"install sglang=={SUPPORTED_SGLANG} here: its internals are hooked by name, other versions are refused"
    return _check("SGLang", found == SUPPORTED_SGLANG, found, remedy)


def entry_points() -> list[Check]:
    """SGLang finds us by these names only; without them it serves as plain SGLang and says nothing."""
    rows = []
    for group, expected in ENTRY_POINTS.items():
        ours = {
            point.name: point.value
            for point in metadata.entry_points(group=group)
            if point.name.startswith("sgl_hq") or point.value.startswith("sgl_hq")
        }
        remedy = "install this project again in this environment; exactly " + ", ".join(expected) + " must be listed"
        rows.append(_check(f"entry point {group}", ours == expected, ", ".join(ours) or "none", remedy))
    return rows


def packages() -> list[Check]:
    """What a server started in the current folder would import as `sgl_hq`, and whether all of it loads."""
    command = [sys.executable, "-c", _IMPORT_ALL, *PACKAGES]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        return [
            Check(
                "packages", "fix", (done.stderr.strip() or "no message").splitlines()[-1], "install this project again"
            )
        ]
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    expected, actual = _installed_at(), found["sgl_hq"]
    same = expected is not None and not actual.startswith("!") and Path(actual).resolve() == expected.resolve()
    remedy = (
        f"a sgl_hq folder hides the installed one ({expected}): start from another folder or install it as editable"
    )
    failed = [f"{name}: {file[1:]}" for name, file in found.items() if file.startswith("!")]
    return [
        _check("sgl_hq imported from", same, actual.lstrip("!"), remedy),
        _check("packages", not failed, "; ".join(failed) or f"all {len(found)} load", "install this project again"),
    ]


def torch_device() -> Check:
    try:
        import torch
    except Exception as error:  # a broken CUDA library raises OSError, a missing wheel ImportError
        return Check("torch", "fix", f"{type(error).__name__}: {error}", "install this project again")
    if torch.cuda.is_available():
        return Check("torch", "ok", f"{torch.__version__}, {torch.cuda.get_device_name(0)}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Check(
        "torch", "note", f"{torch.__version__}, no CUDA, {cores} cores", "serves on the CPU platform: small models only"
    )


def patch_targets() -> Check:
    """Every SGLang function we replace still has the signature we replace."""
    try:
        from sgl_hq.patches.probe import check_all

        with warnings.catch_warnings(action="ignore"):  # SGLang says at import what a CPU cannot do
            problems = check_all()
    except Exception as error:
        problems = [f"{type(error).__name__}: {error}"]
    found = "; ".join(problems) or "all targets found"
    return _check("SGLang hooks", not problems, found, f"install sglang=={SUPPORTED_SGLANG}, unmodified")


def memory() -> Check:
    total_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    remedy = f"below {MEMORY_GB} GB a server may be killed: lower --kv-tokens"
    return _check("memory", total_gb >= MEMORY_GB, f"{total_gb:.0f} GB", remedy, bad="note")


def disk() -> Check:
    folder = demo_model.cache_folder()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free_gb = shutil.disk_usage(existing).free / 1e9
    enough = free_gb >= DISK_GB or demo_model.is_ready("smollm2")
    remedy = f"free {DISK_GB} GB or set SGLANG_HQ_CACHE to another folder"
    writable = os.access(existing, os.W_OK)
    return _check(
        "disk for models",
        enough and writable,
        f"{folder}: {free_gb:.0f} GB free{'' if writable else ', not writable'}",
        remedy,
    )


def demo() -> Check:
    ready = demo_model.is_ready("smollm2")
    found = str(demo_model.model_folder("smollm2")) if ready else "not there yet"
    return _check("demo model", ready, found, "made on first use, or now with: sgl-hq demo-model", bad="note")


def _check(name: str, good: bool, found: str, remedy: str, bad: str = "fix") -> Check:
    return Check(name, "ok", found) if good else Check(name, bad, found, remedy)


def _installed_at() -> Path | None:
    """`sgl_hq/__init__.py` of the installed distribution: in the source tree when editable, else in site-packages."""
    try:
        installed = metadata.distribution("sgl-hq")
    except metadata.PackageNotFoundError:
        return None
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        return Path(unquote(urlsplit(origin["url"]).path)) / "sgl_hq" / "__init__.py"
    return Path(str(installed.locate_file("sgl_hq/__init__.py")))
