"""Shared fixtures. Without a GPU the CPU platform is selected before anything imports SGLang."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # `import tolerances`: importmode importlib does not add the folder
if not torch.cuda.is_available():
    os.environ["SGLANG_PLATFORM"] = "sgl_hq_cpu"

import pytest


@pytest.fixture(autouse=True)
def _clean_hq_environment(monkeypatch):
    """No test inherits options of another one or of the user's shell."""
    for name in list(os.environ):
        if name.startswith(("SGLANG_HQ_", "SGL_HQ_")) and not name.endswith("_CACHE"):
            monkeypatch.delenv(name)
