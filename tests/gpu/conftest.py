"""The servers of all selected GPU tests, started together before the first of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `import fleet`: importmode importlib does not add the folder


@pytest.fixture(scope="session")
def fleet(request, tmp_path_factory):
    """Starts the arms of every selected test: those of each parameter that has `arms`."""
    from fleet import Fleet

    parameters = [value for item in request.session.items if hasattr(item, "callspec") for value in item.callspec.params.values()]
    servers = Fleet(tmp_path_factory.mktemp("models"))
    try:
        servers.start(arm for value in parameters for arm in getattr(value, "arms", ()))
        yield servers
    finally:
        servers.stop()
