"""What the load A/B puts into SGLang's `bench_serving`, in the generator's process: a dataset that is our requests file.

Beyond what `bench_generator.py` has put there:
- a request waits for the one it follows, then for one of `concurrency` places, and its clock starts when it is sent. (The
  generator's own --max-concurrency would let a request that still waits for its predecessor keep a place.)
- lengths, cached tokens and the moment of the first token are read from the server's own account in each chunk: the generator
  states the lengths it asked for, and waits for the first chunk with visible text.
- arrival times: `benchmark` of sglang 0.5.17 does not pass its --use-trace-timestamps on to `get_request`, we do.
"""

from __future__ import annotations

import asyncio
import time
from argparse import Namespace
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sgl_hq.launch import bench_generator
from sgl_hq.launch.bench_generator import Hold
from sgl_hq.launch.load_ab.requests_file import LoadRequest, read

DATASET = "custom"  # whose argument and name our file takes


class Phase:
    """The requests that are being sent. concurrency: places; results: what came back, in the file's order."""

    def __init__(self, requests: Sequence[LoadRequest], concurrency: int):
        self.requests = requests
        self.places = asyncio.Semaphore(concurrency)
        self.ended = [asyncio.Event() for _ in requests]
        self.results: list[dict[str, Any]] = [{} for _ in requests]

    async def send(self, index: int, send: Any) -> Any:
        """`send()` in its turn; a request goes on when its predecessor failed, too, and then finds a colder cache."""
        if (before := self.requests[index].after) is not None:
            await self.ended[before].wait()
        try:
            async with self.places:
                _told.set(told := Told())
                answer = await send()
        finally:
            self.ended[index].set()
        self.results[index] = told.result(answer)
        return answer


class Told:
    """What the server says about one request in the chunks of its answer."""

    def __init__(self) -> None:
        self.meta: dict[str, Any] = {}
        self.first_token: float | None = None  # time.perf_counter()

    def note(self, meta: dict[str, Any]) -> None:
        if self.first_token is None and meta.get("completion_tokens"):
            self.first_token = time.perf_counter()
        self.meta = meta

    def result(self, answer: Any) -> dict[str, Any]:
        """answer: the generator's RequestFuncOutput. Seconds; start_s on the clock of `time.perf_counter`."""
        error = (answer.error or "no answer").strip().splitlines()[-1] if not answer.success else _aborted(self.meta)
        if error is None and self.first_token is None:
            error = "the answer has no token"
        return {
            "start_s": answer.start_time,
            "ttft_s": None if error else self.first_token - answer.start_time,
            "latency_s": answer.latency,
            "prompt_tokens": self.meta.get("prompt_tokens"),
            "cached_tokens": self.meta.get("cached_tokens"),
            "output_tokens": self.meta.get("completion_tokens"),
            "text": answer.generated_text,
            "error": error,
        }


class RequestsFile:
    """Takes the place of SGLang's dataset of that name."""

    def __init__(self, path: Path):
        self._path = path

    @classmethod
    def from_args(cls, args: Namespace) -> RequestsFile:
        return cls(Path(args.dataset_path))

    def load(self, tokenizer: Any, model_id: str | None = None) -> list[Any]:
        """`DatasetRow`s; the routing key carries the index through the generator, it is not sent. Timestamps in ms."""
        from sglang.benchmark.datasets import DatasetRow

        return [
            DatasetRow(
                list(request.prompt), len(request.prompt), request.output,
                timestamp=None if request.at_s is None else request.at_s * 1000,
                routing_key=str(index), extra_request_body=_sampling(request),
            )
            for index, request in enumerate(read(self._path).requests)
        ]  # fmt: skip


_told: ContextVar[Told | None] = ContextVar("_told", default=None)
_phase: Phase | None = None


def prepare(hold: Hold) -> None:
    """As `bench_generator.prepare`, then ours on top."""
    bench_generator.prepare(hold)
    import orjson
    from sglang.benchmark import serving
    from sglang.benchmark.datasets import DATASET_MAPPING

    send, arrivals = serving.ASYNC_REQUEST_FUNCS["sglang"], serving.get_request

    async def send_in_turn(request_func_input: Any, pbar: Any = None) -> Any:
        bare = replace(request_func_input, routing_key=None)
        return await _phase.send(int(request_func_input.routing_key), partial(send, request_func_input=bare, pbar=pbar))

    def parse(chunk: bytes) -> Any:
        message = orjson.loads(chunk)
        if (told := _told.get()) is not None:
            told.note(message.get("meta_info") or {})
        return message

    def at_their_times(requests: list[Any], rate: float) -> Any:
        return arrivals(requests, rate, use_trace_timestamps=serving.args.use_trace_timestamps)

    serving.ASYNC_REQUEST_FUNCS["sglang"] = send_in_turn
    serving.orjson = SimpleNamespace(loads=parse)
    serving.get_request = at_their_times
    DATASET_MAPPING[DATASET] = RequestsFile


def send_requests(arguments: list[str], requests: Path, concurrency: int) -> list[dict[str, Any]]:
    """Run the generator on a requests file; one result for each request, in the file's order (`Told.result`)."""
    global _phase
    _phase = Phase(read(requests).requests, concurrency)
    bench_generator.run_command([*arguments, "--dataset-name", DATASET, "--dataset-path", str(requests)])
    return _phase.results


def _sampling(request: LoadRequest) -> dict[str, Any]:
    """Only where an answer may end early; else the generator's own: greedy, exactly so many tokens."""
    if not request.stop:
        return {}
    params = {"temperature": 0.0, "max_new_tokens": request.output, "ignore_eos": False, "stop": list(request.stop)}
    return {"sampling_params": params}


def _aborted(meta: dict[str, Any]) -> str | None:
    """SGLang may begin an answer and then end it: the last chunk says so."""
    reason = meta.get("finish_reason") or {}
    return reason.get("message") or "the server aborted it" if reason.get("type") == "abort" else None
