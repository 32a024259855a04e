"""What a measurement needs beside its numbers: versions, commit, machine."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil


def run_facts() -> dict[str, Any]:
    """Keys `versions`, `commit` (None outside a git checkout), `machine`; plain JSON values, `ram_bytes` in bytes."""
    return {
        "versions": {
            "sgl_hq": version("sgl-hq"),
            "sglang": version("sglang"),
            "torch": version("torch"),
            "python": platform.python_version(),
        },
        "commit": _commit(Path(__file__).resolve().parent.parent),
        "machine": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "ram_bytes": psutil.virtual_memory().total,
        },
    }


def _commit(root: Path) -> str | None:
    """The commit checked out at `root`, with "-dirty" where tracked files differ from it."""
    if not (root / ".git").exists():
        return None
    described = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
        capture_output=True, text=True, check=False,
    )
    return described.stdout.strip() or None


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
