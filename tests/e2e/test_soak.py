"""Packing servers under random requests, a fifth of them given up, in a pool that is always full: nothing is lost, nothing grows.

SOAK_SECONDS (default 45) is the length for each format; from 600 on prompts go up to the model's context. SGLang checks its own books in
every step and when idle, ours are walked whenever a request ends, stale KV is NaN (`checked_server.py`): the first finding ends the server.
"""

from __future__ import annotations

import os

import checked_server
import openai
import pytest
from soak import Load, books, probe, storm
from soak_report import MIB, problems, summary
from strict_server import STRICT_CHECKS

from sgl_hq.launch.server_process import ServerProcess

SECONDS = float(os.environ.get("SOAK_SECONDS", "45"))
# Prompts as long as the model's context take a CPU 20 s and more: for the long run. The dense tier holds one of them and little else,
# and both tiers together hold less than the families' texts.
LONGEST, BUDGET, PACKED_FRACTION = (8100, 12288, 0.3) if SECONDS >= 600 else (1900, 4096, 0.2)
LOAD = Load(clients=6, families=4, longest=LONGEST, new_tokens=8)
ARGS = ["--max-total-tokens", str(BUDGET), "--chunked-prefill-size", "1024",
        "--grammar-backend", "none", "--random-seed", "0"]  # fmt: skip
# A request that is never let go holds its token ids and log-probabilities: tens of kB, of which the long run has thousands. In the short
# one, memory that PyTorch and the C library keep for reuse still grows (46 MiB were seen): only what is lost in large pieces shows.
HOST_GROWTH = (32 if SECONDS >= 600 else 128) * MIB
# oneDNN keeps a matrix product compiled for every number of tokens it has seen, up to 1,024 of each kind: hundreds of MiB within half an
# hour, in SGLang alone as much. The second name is that of PyTorch's own table beside oneDNN's (ideep, `computation_cache`).
FEW_PRODUCTS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "16"}
# The C library gives large blocks back at once, instead of keeping holes between small ones.
NO_HOLES = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@pytest.fixture(scope="module", params=[("bf16", PACKED_FRACTION), ("hq7", "auto")], ids=lambda p: f"{p[0]}-{p[1]}")
def server(request, model):
    fmt, fraction = request.param
    args = [*ARGS, "--hq-format", fmt, "--hq-packed-fraction", str(fraction)]
    server = ServerProcess(str(model), args, env=STRICT_CHECKS | FEW_PRODUCTS | NO_HOLES, start_timeout_s=600, stop_grace_s=0)
    server.argv[1:3] = [checked_server.__file__]
    with server:
        yield server


def _chat(url: str) -> str:
    client = openai.OpenAI(base_url=url + "/v1", api_key="none")
    question = [{"role": "user", "content": "Name the capital of France."}]
    return client.chat.completions.create(model="m", messages=question, max_tokens=24, temperature=0).choices[0].message.content


@pytest.mark.timeout(1800 + 2 * SECONDS)
def test_every_page_is_accounted_for_after_a_storm(server):
    answer, before = _chat(server.url), probe(server)
    assert "Paris" in answer
    try:
        report = storm(server, LOAD, SECONDS)
        print(summary(report))
        assert not problems(report, HOST_GROWTH, device_growth=1) + books(server)
        assert probe(server) == before, "the same request alone gives other answers than before the storm"
        assert _chat(server.url) == answer
    finally:
        log = server.log_text()
        print(log[-3000:])
    assert "leak" not in log.lower() and "Traceback" not in log
