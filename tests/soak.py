"""A server under random requests in a pool that is always full, for a stated time: what the CPU and the GPU soak share.

`storm` sends and samples, `soak_report.problems` judges. The time counts from the moment that packed pages had to be dropped for
others. A fifth of the requests is given up by its client. Prompts begin with a text that their family shares, cut at a length that
is log-uniform, so that short and long prefixes are equally frequent.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from soak_report import Report, Sample

from sgl_hq.launch.server_process import ServerProcess
from sgl_hq.page_format import PAGE_TOKENS

SAMPLES = 120  # over the whole time
FILL_S = 1200.0  # until then the pool must be full
KINDS = {"read": 79, "hang up": 8, "give up": 6, "abort": 5, "flush": 1}  # of 100 requests
ABORTED_BY_OTHERS = 6  # of 100 requests; "abort all" ends one of every client, so with more clients it is rarer
PROBE_TOKENS = 5 * PAGE_TOKENS + 10


@dataclass(frozen=True)
class Load:
    """longest: tokens of the longest prompt, tail included; new_tokens: at most so many are generated."""

    clients: int
    families: int
    longest: int
    new_tokens: int


def state(server: ServerProcess) -> dict:
    """The `hq` block of /server_info."""
    return server.server_info()["internal_states"][0]["hq"]


def idle_state(server: ServerProcess, seconds: float = 60) -> dict:
    """The `hq` block once no request is live."""
    deadline = time.monotonic() + seconds
    while (now := state(server))["live_requests"]:
        assert time.monotonic() < deadline, f"{now['live_requests']} requests are live {seconds:.0f} s after their clients left"
        time.sleep(0.1)
    return now


def probe(server: ServerProcess) -> list[list[tuple[float, int]]]:
    """(log-probability, token) of one fixed request's answer, alone on an empty server three times: cold, then as the second user
    of its prefix, which packs it, then behind packed pages."""
    idle_state(server)
    server.flush_cache()
    ids = [100 + (37 * i) % 4096 for i in range(PROBE_TOKENS)]
    return [_generate(server, ids, 24) for _ in range(3)]


def books(server: ServerProcess) -> list[str]:
    """What does not add up on an idle server, before and after a flush."""
    before = idle_state(server)
    server.flush_cache()
    after = idle_state(server)
    dense, packed = before["dense"], before["packed"]
    used = dense["tokens_total"] - dense["tokens_free"] - packed["dense_pages_lent"] * PAGE_TOKENS
    holds = {
        "free and used packed pages are not all": packed["pages_free"] + packed["pages_used"] == packed["pages_total"],
        "used bytes are not those of used dense tokens": used * dense["bytes_per_token"] == dense["bytes_used"],
        "dense tokens leaked": after["dense"]["tokens_free"] == after["dense"]["tokens_total"],
        "packed pages leaked": after["packed"]["pages_used"] == 0,
        "sinks leaked": after["packed"]["sinks_free"] == after["packed"]["sinks_total"],
    }  # fmt: skip
    return [what for what, true in holds.items() if not true]


def storm(server: ServerProcess, load: Load, seconds: float, seed: int = 7, device_bytes: Callable[[], int] = lambda: 0) -> Report:
    """Keep `load.clients` requests in flight until the pool has been full for `seconds`. device_bytes: bytes taken on the GPU."""
    report = Report()

    async def run() -> None:
        over = asyncio.Event()
        # SGLang closes a connection that idles for 5 s: a request sent on it at that moment would be taken for a failed one.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as http:
            kinds = deal_kinds(load, random.Random(seed))
            clients = [_client(http, load, kinds, random.Random(f"{seed} {i}"), over, report) for i in range(load.clients)]
            await asyncio.gather(_watch(server, http, seconds, device_bytes, over, report), *clients)

    asyncio.run(run())
    return report


# ---- clients ---------------------------------------------------------------------------------------------------------


def deal_kinds(load: Load, rng: random.Random) -> Iterator[str]:
    """What the next request of any client is, dealt from a shuffled pack with one "abort all". Drawn each by itself, a short run's
    eighty had 31 % given up every few times, for no reason but chance."""
    hundreds = max(1, round(load.clients / ABORTED_BY_OTHERS))
    pack = [kind for kind, count in KINDS.items() for _ in range(count * hundreds)] + ["abort all"]
    while True:
        rng.shuffle(pack)
        yield from pack


async def _client(
    http: httpx.AsyncClient, load: Load, kinds: Iterator[str], rng: random.Random, over: asyncio.Event, report: Report
) -> None:
    while not over.is_set():
        kind = next(kinds)
        try:
            report.outcome[await _act(kind, http, load, rng, report)] += 1
        except Exception as error:  # every one is a finding; the others go on
            report.failures.append(f"{kind}: {error!r}"[:300])
            await asyncio.sleep(1)


async def _act(kind: str, http: httpx.AsyncClient, load: Load, rng: random.Random, report: Report) -> str:
    """What became of one request."""
    if kind == "flush":  # refused while requests run, done when none does: both are fine
        await http.post("/flush_cache")
        return kind
    if kind == "abort all":
        await http.post("/abort_request", json={"abort_all": True})
        return kind
    body = _body(_prompt(load, rng), rng.randint(1, load.new_tokens))
    report.longest_prompt = max(report.longest_prompt, len(body["input_ids"]))
    if kind == "hang up":
        return await _hang_up(http, body, rng.randrange(1, 6))
    body["rid"] = f"{rng.getrandbits(64):016x}"
    asked = asyncio.create_task(http.post("/generate", json=body))
    if kind in ("give up", "abort"):
        await asyncio.wait([asked], timeout=math.exp(rng.uniform(math.log(0.01), math.log(5))))
        if kind == "give up" and not asked.done():
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            return kind
        if kind == "abort":
            await http.post("/abort_request", json={"rid": body["rid"]})
    return _judge(await asked, body, report)


async def _hang_up(http: httpx.AsyncClient, body: dict, after: int) -> str:
    """Read `after` events of a stream and close the connection."""
    async with http.stream("POST", "/generate", json=body | {"stream": True}) as stream:
        assert stream.status_code == 200, stream.status_code
        async for line in stream.aiter_lines():
            after -= line.startswith("data:")
            if not after:
                break
    return "hang up"


def _judge(answer: httpx.Response, body: dict, report: Report) -> str:
    """A whole answer with finite log-probabilities, or one that says that it was aborted."""
    if "abort" in answer.text.lower():
        return "aborted"
    assert answer.status_code == 200, f"{answer.status_code} {answer.text[:200]}"
    logprobs = _logprobs(answer)
    assert len(logprobs) == body["sampling_params"]["max_new_tokens"], f"{len(logprobs)} tokens"
    report.tokens += len(logprobs)
    return "read"


def _logprobs(answer: httpx.Response) -> list[tuple[float, int]]:
    found = [tuple(entry[:2]) for entry in answer.json()["meta_info"]["output_token_logprobs"]]
    assert all(p is not None and math.isfinite(p) for p, _ in found), f"log-probabilities are not finite: {found}"
    return found


def _generate(server: ServerProcess, ids: list[int], new_tokens: int) -> list[tuple[float, int]]:
    answer = httpx.post(server.url + "/generate", json=_body(ids, new_tokens), timeout=600)
    answer.raise_for_status()
    return _logprobs(answer)


def _body(ids: list[int], new_tokens: int) -> dict:
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    return {"input_ids": ids, "return_logprob": True, "sampling_params": sampling}


def _prompt(load: Load, rng: random.Random) -> list[int]:
    family, tail = rng.randrange(load.families), rng.randrange(1, PAGE_TOKENS)
    prefix = int(math.exp(rng.uniform(0, math.log(load.longest - tail))))
    return [1000 + (97 * family + i * (family + 3)) % 5000 for i in range(prefix)] + [rng.randrange(10, 40000) for _ in range(tail)]


async def _watch(server, http, seconds: float, device_bytes, over: asyncio.Event, report: Report) -> None:
    """Wait until the pool is full, then take samples until the time is over."""
    started, full_since = time.monotonic(), None
    main = psutil.Process(server._process.pid)
    while full_since is None or time.monotonic() < full_since + seconds:
        now = (await http.get("/server_info")).json()["internal_states"][0]["hq"]
        dense, packed = now["dense"], now["packed"]
        dense_full, packed_full = 1 - dense["tokens_free"] / dense["tokens_total"], 1 - packed["pages_free"] / packed["pages_total"]
        if full_since is None and now["counters"]["pages_dropped"]:
            full_since = time.monotonic()
            report.filled_s = full_since - started
        if full_since is not None:
            host = sum(map(_own_bytes, (main, *main.children(recursive=True))))
            report.samples.append(Sample(host, device_bytes(), dense_full, packed_full, now["counters"]["pages_dropped"]))
        assert full_since is not None or time.monotonic() < started + FILL_S, f"the packed tier is not full after {FILL_S:.0f} s"
        await asyncio.sleep(seconds / SAMPLES)
    over.set()


def _own_bytes(process: psutil.Process) -> int:
    """Anonymous memory of a process, in memory or swapped out. Pages of files come and go with what else runs on the machine."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    return sum(int(status[name].split()[0]) * 1024 for name in ("RssAnon", "VmSwap"))
