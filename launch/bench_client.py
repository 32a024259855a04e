"""SGLang's load generator, `python -m sglang.bench_serving`, in one process that stays: its imports cost ten seconds a start."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from sgl_hq.launch.bench_facts import BenchError
from sgl_hq.launch.bench_workloads import Wave
from sgl_hq.launch.server_process import ServerProcess


class LoadClient:
    """Runs waves against servers, one after another; a context manager. Everything it prints goes to `folder`/client.log.

    folder: also holds the generator's cached prompts and the results.
    """

    def __init__(self, folder: Path):
        self._folder, self._waves = folder, 0
        self.log = folder / "client.log"
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, initializer=_prepare, initargs=(str(folder), str(self.log)))
        self._pool.submit(_import)  # meanwhile the first server starts

    def __enter__(self) -> LoadClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        # After Ctrl-C or a failure the child may be in a wave that never ends.
        for child in list(self._pool._processes.values()) if kind else []:
            child.kill()
        self._pool.shutdown(wait=kind is None, cancel_futures=True)

    def run(self, server: ServerProcess, wave: Wave, model: str, tokenizer: str) -> dict[str, Any]:
        """Send the wave; returns the generator's result.

        Raises ServerFailed when the server ended meanwhile, BenchError when the generator failed or a request did.
        """
        self._waves += 1
        output = self._folder / f"wave-{self._waves}.jsonl"
        running = self._pool.submit(_run, wave.arguments(server.url, model, tokenizer, str(output)))
        while not wait([running], timeout=1.0).done:
            server.check_alive()
        if error := running.exception():
            raise BenchError(f"bench_serving failed: {error} (log: {self.log})") from error
        result = json.loads(output.read_text().splitlines()[-1])
        if result["completed"] != wave.requests:
            raise BenchError(f"{result['completed']} of {wave.requests} requests were answered (log: {self.log})")
        return result


def _prepare(folder: str, log: str) -> None:
    """In the child: prompts of one run only, since the generator's cache does not know the tokenizer by more than its class."""
    os.environ["HOME"] = folder
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())


def _import() -> None:
    import sglang.bench_serving  # noqa: F401


def _run(arguments: list[str]) -> None:
    from sglang.bench_serving import cli_main

    sys.argv = ["bench_serving", *arguments]
    try:
        cli_main()
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"bench_serving ended with exit code {ended.code}") from ended
    finally:
        sys.stdout.flush()
