"""Shared fixtures. The CPU platform is selected before anything imports SGLang."""

from __future__ import annotations

import os

os.environ["SGLANG_PLATFORM"] = "sgl_hq_cpu"
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import pytest


@pytest.fixture(autouse=True)
def _clean_hq_environment(monkeypatch):
    """No test inherits options of another one or of the user's shell."""
    for name in list(os.environ):
        if name.startswith(("SGLANG_HQ_", "SGL_HQ_")) and not name.endswith("_CACHE"):
            monkeypatch.delenv(name)
