"""Real servers on the CPU platform with a real model."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--e2e-model", default="smollm2", help="demo model of the end-to-end tests (sgl-hq demo-model --model)")


@pytest.fixture(scope="session")
def model(pytestconfig) -> Path:
    from sgl_hq.launch.demo_model import ensure_demo_model

    return ensure_demo_model(name=pytestconfig.getoption("--e2e-model"))
