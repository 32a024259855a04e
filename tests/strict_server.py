"""Servers that check SGLang's books in every step of the scheduler and when idle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from sgl_hq.launch.server_process import ServerProcess

STRICT_CHECKS = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_DEBUG_MEMORY_POOL": "1"}


@contextmanager
def strict_server(model: Path, args: Sequence[str], env: Mapping[str, str] = {}) -> Iterator[ServerProcess]:
    """On the CPU; at the end its log must tell of no leak and no exception."""
    with ServerProcess(str(model), args, env=STRICT_CHECKS | env, stop_grace_s=0, start_timeout_s=780) as server:
        yield server
        log = server.log_text()
        assert "leak" not in log.lower() and "Traceback" not in log, log[-3000:]
