"""The soak of `e2e/test_soak.py` on a GPU: the shape of Qwen2.5-7B with dummy weights, decode CUDA graphs, prompts of 1 to 8,192 tokens.

SOAK_ARMS: names of ARMS, default all; they are served at once, each with its own pool. SOAK_SECONDS (default 300) counts from the moment
that packed pages had to be dropped. Stale KV is NaN (`poisoned_server.py`).
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
# Format, KV budget in bf16 tokens, --hq-packed-fraction. The packed tiers hold 9,800, 36,000 and at most about 40,000 tokens; the
# families' texts have 131,072.
ARMS = {"bf16": ("bf16", 65536, "0.15"), "hq4": ("hq4", 65536, "0.15"), "hq4-auto": ("hq4", 16384, "auto")}
NAMES = os.environ.get("SOAK_ARMS", ",".join(ARMS)).split(",")
LOAD = Load(clients=48, families=16, longest=8192 + PAGE_TOKENS, new_tokens=64)
ARGS = ["--attention-backend", "flashinfer", "--load-format", "dummy", "--skip-tokenizer-init", "--grammar-backend", "none",
        "--random-seed", "0", "--hq-allow-ungated", "--cuda-graph-max-bs-decode", "64", "--chunked-prefill-size", "4096",
        "--mem-fraction-static", "0.8"]  # fmt: skip
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
    """By name."""
    folder = tmp_path_factory.mktemp("qwen-7b-shape")
    pynvml.nvmlInit()
    (folder / "config.json").write_text(json.dumps(QWEN_7B))
    started = {}
    for name in NAMES:
        fmt, budget, fraction = ARMS[name]
        options = [*ARGS, "--hq-format", fmt, "--max-total-tokens", str(budget), "--hq-packed-fraction", fraction]
        started[name] = ServerProcess(str(folder), options, env=STRICT_CHECKS, cpu=False, start_timeout_s=400, stop_grace_s=0)
        started[name].argv[1:3] = [str(Path(__file__).with_name("poisoned_server.py"))]
    with ThreadPoolExecutor(len(NAMES)) as pool:
        try:
            list(pool.map(ServerProcess.start, started.values()))
            yield started
        finally:
            list(pool.map(ServerProcess.stop, started.values()))


def _soak(server: ServerProcess, name: str) -> list[str]:
    try:
        before = probe(server)
        report = storm(server, LOAD, SECONDS, device_bytes=lambda: _device_bytes(server))
        print(f"{name}: {summary(report)}")
        found = problems(report, HOST_GROWTH, DEVICE_GROWTH) + books(server)
        if probe(server) != before:
            found.append("the same request alone gives other answers than before the storm")
        log = server.log_text()
        return [f"{name}: {what}" for what in found + [word for word in ("Leak", "Traceback") if word in log]]
    except Exception as error:
        return [f"{name}: {error!r}\n{server.log_text()[-3000:]}"]


@pytest.mark.timeout(1800 + 2 * SECONDS)
def test_every_page_is_accounted_for_after_a_storm(servers):
    with ThreadPoolExecutor(len(NAMES)) as pool:
        found = list(pool.map(lambda name: _soak(servers[name], name), NAMES))
    assert not [problem for of_arm in found for problem in of_arm], "\n".join(map(str, found))
