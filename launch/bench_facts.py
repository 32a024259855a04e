"""What a benchmark row carries beside its figures: commit, versions, GPU, command; and how the rows are written."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sgl_hq import json_file
from sgl_hq.launch.run_facts import run_facts

_PACKAGES = ("triton", "flashinfer-python", "sglang-kernel")


class BenchError(RuntimeError):
    """A benchmark cannot be run as asked; the message says why and what to do."""


def bench_facts(commit: str | None = None) -> dict[str, Any]:
    """`run_facts` with the GPU, the packages that hold GPU kernels, and the command. commit: where this is a copy of a checkout."""
    import torch

    facts = run_facts()
    facts["commit"] = commit or facts["commit"]
    facts["versions"] |= {name: _version(name) for name in _PACKAGES} | {"cuda": torch.version.cuda}
    facts["machine"] |= {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}
    return facts | {"command": command_line(sys.argv[1:])}


def command_line(arguments: Sequence[str]) -> str:
    """The command as typed, with folders of this machine cut to their last name."""
    return shlex.join(["sgl-hq", *(Path(a).name if a.startswith(("/", "~")) else a for a in arguments)])


def write_rows(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], path: Path) -> None:
    """One JSON list, every row with the facts; the file appears whole or not at all."""
    json_file.write_json([{**row, **facts} for row in rows], path)


def check_json_path(path: Path | None) -> None:
    """Raises BenchError before minutes of measuring, not after."""
    if path is not None and not path.resolve().parent.is_dir():
        raise BenchError(f"--json: there is no directory {path.resolve().parent}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
