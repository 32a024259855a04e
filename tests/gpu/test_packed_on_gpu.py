"""Packed formats served on a GPU: same answers as vanilla, packed pages really read, books balanced, graphs on.

Marked `gpu` (pyproject.toml). `fleet.py` has the servers.
"""

from __future__ import annotations

import random
import re
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import httpx
import pytest
from fleet import LARGEST_GRAPH, VOCAB, Arm

from sgl_hq.launch.server_process import ServerProcess

pytestmark = pytest.mark.gpu

FORMATS = ("bf16", "hq6")
PREFIX, SHARERS, CROWD, NEW_TOKENS = 1024, LARGEST_GRAPH, LARGEST_GRAPH + 4, 24  # a crowd is larger than the largest decode graph
# bf16 roundings (2**-9 relative) go through 6 layers of sharp attention; where sums are split decides which. Vanilla repeats itself
# bit for bit on these small batches, so its own other backend shows what another order of summation does. Ours has one more
# still and rounds the dense state once more a layer: bounds for the median and the largest difference, so many times that.
TIMES_VANILLA = 2.0


class Setup(NamedTuple):
    backend: str
    head_dim: int

    @property
    def vanilla(self) -> Arm:
        return Arm(self.backend, None, self.head_dim)

    @property
    def other(self) -> Arm:
        """Vanilla with another backend."""
        return Arm("flashinfer" if self.backend == "triton" else "triton", None, self.head_dim)

    @property
    def packing(self) -> dict[str, Arm]:
        return {fmt: Arm(self.backend, fmt, self.head_dim) for fmt in FORMATS}

    @property
    def arms(self) -> list[Arm]:
        return [self.vanilla, self.other, *self.packing.values()]


SETUPS = [Setup("flashinfer", 128), Setup("triton", 128), Setup("fa3", 128), Setup("fa3", 64)]


def ask(server: ServerProcess, ids: list[int], new_tokens: int = NEW_TOKENS, from_token: int = -1) -> list[tuple[float, int]]:
    """(log-probability, token) of the prompt's tokens from `from_token` on (-1: none), then of the answer's."""
    body = {"input_ids": ids, "return_logprob": True, "logprob_start_len": from_token,
            "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}}
    answer = httpx.post(server.url + "/generate", json=body, timeout=120)
    answer.raise_for_status()
    meta = answer.json()["meta_info"]
    prompt = [] if from_token < 0 else meta["input_token_logprobs"][1:]
    return [tuple(entry[:2]) for entry in prompt + meta["output_token_logprobs"]]


def state(server: ServerProcess) -> dict:
    return server.server_info()["internal_states"][0]["hq"]


def prompts(seed: int, tail: int, count: int) -> list[list[int]]:
    """`count` prompts of PREFIX shared tokens and `tail` own ones."""
    shared = random.Random(1)
    prefix = [shared.randrange(10, VOCAB - 10) for _ in range(PREFIX)]
    own = random.Random(seed)
    return [prefix + [own.randrange(10, VOCAB - 10) for _ in range(tail)] for _ in range(count)]


def measure(server: ServerProcess) -> dict[str, list]:
    """Cold; a wave of sharers; long tails in chunks of 256 behind the packed prefix, so with a dense prefix too; a crowd, which decodes
    without graphs."""
    with ThreadPoolExecutor(CROWD) as pool:
        cold = [ask(server, prompts(1, 37, 1)[0])]
        wave = list(pool.map(lambda ids: ask(server, ids, from_token=PREFIX + 1), prompts(2, 37, SHARERS)))
        chunked = list(pool.map(lambda ids: ask(server, ids, 8, from_token=PREFIX + 1), prompts(3, 700, 2)))
        crowd = list(pool.map(lambda ids: ask(server, ids, from_token=PREFIX + 1), prompts(4, 50, CROWD)))
    return {"cold": cold, "wave": wave, "chunked": chunked, "crowd": crowd}


def differences(a: dict[str, list], b: dict[str, list], part: str) -> list[float]:
    """Of the log-probabilities, position by position until the tokens part (a near tie decides differently)."""
    out = []
    for left, right in zip(a[part], b[part], strict=True):
        for (p, token), (q, other) in zip(left, right):
            if token != other:
                break
            out.append(abs(p - q))
    return out


def abort_storm(server: ServerProcess) -> None:
    """Requests of all lengths, every third one given up by its client after a moment; then wait until the server is idle."""
    rng = random.Random(9)

    def one(i: int) -> None:
        ids = prompts(100 + i, rng.randrange(1, 600), 1)[0]
        try:
            body = {"input_ids": ids, "sampling_params": {"temperature": 0, "max_new_tokens": rng.randrange(1, 200), "ignore_eos": True}}
            httpx.post(server.url + "/generate", json=body, timeout=0.05 if i % 3 == 0 else 120)
        except httpx.TimeoutException:
            pass

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(48)))
    for _ in range(100):
        if state(server)["live_requests"] == 0:
            return
        time.sleep(0.1)
    raise AssertionError("requests are still running")


@pytest.fixture(scope="module")
def answers():
    """What `measure` got, by arm: setups share their vanilla servers, and a second time would find a warm cache."""
    return {}


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: f"{setup.backend}-{setup.head_dim}")
def test_packed_pages_are_served(fleet, answers, setup):
    if setup.backend == "fa3":
        pytest.importorskip("sgl_kernel.flash_attn", reason="FlashAttention-3 is not installed", exc_type=ImportError)
    servers = {arm: fleet.server(arm) for arm in setup.arms}
    try:
        for arm in setup.arms:
            if arm not in answers:
                answers[arm] = measure(servers[arm])
        vanilla, other = answers[setup.vanilla], answers[setup.other]
        without = [ask(servers[setup.vanilla], ids[PREFIX:], 1, from_token=1) for ids in prompts(2, 37, SHARERS)]
        lost = statistics.median(differences({"wave": without}, vanilla, "wave"))
        problems = []
        for fmt, arm in setup.packing.items():
            problems += [f"{fmt}: {p}" for p in compare(answers[arm], vanilla, other, fmt, lost)]
        with ThreadPoolExecutor() as pool:
            books = pool.map(lambda fmt: check_books(servers[setup.packing[fmt]], fmt), FORMATS)
            problems += [f"{fmt}: {p}" for fmt, found in zip(FORMATS, books, strict=True) for p in found]
        assert not problems
    except BaseException:
        for arm, server in servers.items():
            print(f"---- {arm.name}\n{server.log_text()[-5000:]}")
        raise


def compare(got, vanilla, other, fmt, lost) -> list[str]:
    """lost: median difference where the prefix is left out."""
    problems = []
    for part in got:
        noise = differences(other, vanilla, part)
        ours = differences(got, vanilla, part)
        median, largest = statistics.median(ours), max(ours)
        print(f"{fmt} {part}: {len(ours)} positions, median {median:.4f}, largest {largest:.4f}; without the prefix {lost:.2f}; "
              f"vanilla's other backend: {len(noise)}, median {statistics.median(noise):.4f}, largest {max(noise):.4f}")  # fmt: skip
        if part == "cold":
            fits = largest == 0  # a batch with nothing packed runs vanilla's kernels
        elif fmt == "bf16":
            fits = median <= TIMES_VANILLA * statistics.median(noise) and largest <= TIMES_VANILLA * max(noise)
        else:  # what a lossy format costs is measured elsewhere; here: nearer than an answer without the prefix
            fits = 0 < median < lost / 2
        if not fits:
            problems.append(f"{part}: median {median}, largest {largest}")
    return problems


def check_books(server, fmt) -> list[str]:
    """After `measure`: packed pages were read, in graphs; after a storm of aborts and a flush: nothing is lost."""
    seen = state(server)
    counters, packed = seen["counters"], seen["packed"]
    charged = float(re.search(r"workspaces of ([0-9.]+) MiB", server.log_text())[1])
    print(f"{fmt}: {counters}, workspace {seen['workspace_bytes'] / 2**20:.1f} MiB, started in {server.start_s:.0f} s")
    # Each sharer reads the prefix in its prefill and in every decode step; the first wave packs it.
    checks = {
        "sharers read packed pages": counters["packed_tokens_attended"] >= (SHARERS + CROWD) * (NEW_TOKENS - 2) * PREFIX,
        "pages are read once per group": counters["packed_tokens_read"] < counters["packed_tokens_attended"] / 2,
        "the prefix is packed": packed["pages_used"] >= PREFIX // 64 and counters["refused"]["unpackable"] == 0,
        "the workspace was charged": 0.9 * charged < seen["workspace_bytes"] / 2**20 < 1.5 * charged,  # eager plans may grow
    }
    alone = random.Random(77)
    ask(server, [alone.randrange(10, VOCAB - 10) for _ in range(200)])
    unshared = state(server)["counters"]["packed_tokens_attended"]
    checks["an unshared request reads no packed page"] = unshared == counters["packed_tokens_attended"]
    sizes = re.findall(r"Decode batch, #running-req: (\d+), .*cuda graph: (True|False)", server.log_text())
    checks["decode runs in graphs"] = bool(sizes) and all(graph == "True" for size, graph in sizes if 0 < int(size) <= SHARERS)

    abort_storm(server)
    server.flush_cache()  # SGLang checks the dense tier for leaks when idle, and ends the server on one
    time.sleep(2)
    server.check_alive()
    empty = state(server)
    print(f"{fmt} after the storm: {empty['counters']}")
    checks["packed pages are free"] = empty["packed"]["pages_used"] == 0
    checks["sinks are free"] = empty["packed"]["sinks_free"] == empty["packed"]["sinks_total"]
    checks["dense tokens are free"] = empty["dense"]["tokens_free"] == empty["dense"]["tokens_total"] and empty["live_requests"] == 0
    return [what for what, holds in checks.items() if not holds]
