"""Shared fixtures. Without a GPU the CPU platform is selected before anything imports SGLang."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# A worker of `pytest -n` and its servers take their share of the cores: OpenMP threads of two that meet on one core spin against each
# other, which made the gate's test of SmolLM2 take 300 s for 35 s.
if WORKERS := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(WORKERS))))

import torch

sys.path.insert(0, str(Path(__file__).parent))  # `import tolerances`: importmode importlib does not add the folder
if not torch.cuda.is_available():
    os.environ["SGLANG_PLATFORM"] = "sgl_hq_cpu"

import pytest


def pytest_collection_modifyitems(items):
    """Workers begin with the files that take minutes, those of real servers: none is left over when the other worker has no more."""
    if WORKERS:
        items.sort(key=lambda item: "e2e" not in item.path.parts)


@pytest.fixture(autouse=True)
def _clean_hq_environment(monkeypatch):
    """No test inherits options of another one or of the user's shell."""
    for name in list(os.environ):
        if name.startswith(("SGLANG_HQ_", "SGL_HQ_")) and not name.endswith("_CACHE"):
            monkeypatch.delenv(name)
