"""The soak of `e2e/test_soak.py` on a GPU: the shape of Qwen2.5-7B with dummy weights, decode CUDA graphs, prompts of 1 to 8,192 tokens.

SOAK_SECONDS (default 300) counts from the moment that packed pages had to be dropped. Both formats are served at once, each with
its own pool; stale KV is NaN (`poisoned_server.py`).
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pynvml
import pytest
from soak import Load, books, probe, storm
from soak_report import MIB, problems, summary
from strict_server import STRICT_CHECKS

from sgl_hq.launch.bench_model import QWEN_7B
from sgl_hq.launch.server_process import ServerProcess
from sgl_hq.page_format import PAGE_TOKENS

pytestmark = pytest.mark.gpu

SECONDS = float(os.environ.get("SOAK_SECONDS", "300"))
FORMATS = ("bf16", "hq4")
LOAD = Load(clients=48, families=16, longest=8192 + PAGE_TOKENS, new_tokens=64)
# 15 % of the budget hold 36,000 packed tokens in hq4 and 9,800 in bf16; the families' texts have 131,072.
ARGS = ["--load-format", "dummy", "--skip-tokenizer-init", "--grammar-backend", "none", "--random-seed", "0", "--hq-allow-ungated",
        "--max-total-tokens", "65536", "--hq-packed-fraction", "0.15", "--cuda-graph-max-bs-decode", "64",
        "--chunked-prefill-size", "4096", "--mem-fraction-static", "0.8"]  # fmt: skip
HOST_GROWTH = 96 * MIB
# Pools and graphs are allocated at the start; what grows is PyTorch's cache for prefills, which has seen every size by then.
DEVICE_GROWTH = 256 * MIB


def _device_bytes(server: ServerProcess) -> int:
    """GPU memory of this server's processes alone: others run beside it."""
    main = psutil.Process(server._process.pid)
    own = {process.pid for process in (main, *main.children(recursive=True))}
    taken = [p.usedGpuMemory for p in pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(0)) if p.pid in own]
    assert taken and all(taken), f"NVML names no memory of this server: {taken}"
    return sum(taken)


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """By format."""
    folder = tmp_path_factory.mktemp("qwen-7b-shape")
    pynvml.nvmlInit()
    (folder / "config.json").write_text(json.dumps(QWEN_7B))
    started = {}
    for fmt in FORMATS:
        options = [*ARGS, "--hq-format", fmt]
        started[fmt] = ServerProcess(str(folder), options, env=STRICT_CHECKS, cpu=False, start_timeout_s=400, stop_grace_s=0)
        started[fmt].argv[1:3] = [str(Path(__file__).with_name("poisoned_server.py"))]
    with ThreadPoolExecutor(len(FORMATS)) as pool:
        try:
            list(pool.map(ServerProcess.start, started.values()))
            yield started
        finally:
            list(pool.map(ServerProcess.stop, started.values()))


def _soak(server: ServerProcess, fmt: str) -> list[str]:
    try:
        before = probe(server)
        report = storm(server, LOAD, SECONDS, device_bytes=lambda: _device_bytes(server))
        print(f"{fmt}: {summary(report)}")
        found = problems(report, HOST_GROWTH, DEVICE_GROWTH) + books(server)
        if probe(server) != before:
            found.append("the same request alone gives other answers than before the storm")
        log = server.log_text()
        return [f"{fmt}: {what}" for what in found + [word for word in ("Leak", "Traceback") if word in log]]
    except Exception as error:
        return [f"{fmt}: {error!r}\n{server.log_text()[-3000:]}"]


@pytest.mark.timeout(1800 + 2 * SECONDS)
def test_every_page_is_accounted_for_after_a_storm(servers):
    with ThreadPoolExecutor(len(FORMATS)) as pool:
        found = list(pool.map(lambda fmt: _soak(servers[fmt], fmt), FORMATS))
    assert not [problem for of_format in found for problem in of_format], "\n".join(map(str, found))
