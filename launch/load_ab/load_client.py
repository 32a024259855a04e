"""Sends a requests file to a server with SGLang's load generator, and checks that the server read what the file holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sgl_hq.launch.bench_client import GeneratorProcess
from sgl_hq.launch.bench_facts import BenchError
from sgl_hq.launch.bench_model import BenchModel
from sgl_hq.launch.load_ab import load_generator
from sgl_hq.launch.load_ab.requests_file import RequestSet
from sgl_hq.launch.server_process import ServerProcess

Results = list[dict[str, Any]]


class RequestsClient(GeneratorProcess):
    """The generator's process; a context manager. Its output goes to `folder`/client.log."""

    def __init__(self, folder: Path):
        super().__init__(folder, load_generator.prepare)

    def send(
        self, server: ServerProcess, requests: RequestSet, path: Path, model: BenchModel, concurrency: int, rate: float | None
    ) -> Results:
        """Send `requests`, which are the file at `path`, and wait for every answer; results in the file's order.

        A result: start_s on the clock of `time.perf_counter`, which all processes of a machine share, ttft_s, latency_s;
        prompt_tokens, cached_tokens and output_tokens as the server says; text; error, None where the request was answered.
        Raises ServerFailed when the server ended, BenchError when the generator failed or the server read prompts or made
        answers of other lengths.
        """
        arguments = generator_arguments(server.url, requests, model, rate)
        results = self.result(self.submit(load_generator.send_requests, arguments, path, concurrency), server)
        check_lengths(requests, results)
        return results


def is_open_loop(requests: RequestSet, rate: float | None) -> bool:
    """Requests arrive when they arrive, whatever is in flight; otherwise as places become free."""
    return rate is not None or requests.requests[0].at_s is not None


def generator_arguments(url: str, requests: RequestSet, model: BenchModel, rate: float | None) -> list[str]:
    """The command line of `python -m sglang.bench_serving`, without the dataset. Arrivals of a rate depend on the seed alone."""
    args = ["--backend", "sglang", "--base-url", url, "--model", model.path, "--tokenizer", model.tokenizer, "--tokenize-prompt"]
    args += ["--seed", str(requests.seed), "--disable-tqdm", "--cache-report", "--warmup-requests", "0", "--ready-check-timeout-sec", "0"]
    args += ["--output-file", os.devnull]  # what comes back is kept request by request
    if requests.requests[0].at_s is not None:
        return [*args, "--use-trace-timestamps"]
    return args if rate is None else [*args, "--request-rate", str(rate)]


def check_lengths(requests: RequestSet, results: Results) -> None:
    """Raises BenchError when an answered request was read, or answered, with another length than the file's."""
    for index, (request, result) in enumerate(zip(requests.requests, results, strict=True)):
        if result["error"]:
            continue
        if result["prompt_tokens"] != len(request.prompt):
            raise BenchError(
                f"Request {index} of {requests.workload} has {len(request.prompt)} tokens, the server read {result['prompt_tokens']}: "
                "serve with the tokenizer that the plan names"
            )
        if result["output_tokens"] != request.output and not (request.stop and 0 < result["output_tokens"] < request.output):
            raise BenchError(
                f"Request {index} of {requests.workload} asks for {request.output} tokens, the server says that it made "
                f"{result['output_tokens']}: the figures would be of other answers"
            )
