"""SGLang's load generator, `python -m sglang.bench_serving`, in one process that stays: its imports cost ten seconds a start.

`GeneratorProcess` is that process; `LoadClient` sends the waves of `sgl-hq bench serve` with it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sgl_hq.launch import bench_generator
from sgl_hq.launch.bench_facts import BenchError
from sgl_hq.launch.bench_generator import Hold
from sgl_hq.launch.bench_workloads import Wave
from sgl_hq.launch.server_process import ServerProcess

ACCEPT_TIMEOUT_S = 120.0
# The server begins an answer just before it passes the request on to the scheduler.
SETTLE_S = 0.1


class GeneratorProcess:
    """The process with the generator in it; a context manager. Everything it prints goes to `folder`/client.log.

    prepare: called once in the process, imports the generator and puts what is ours into it.
    """

    def __init__(self, folder: Path, prepare: Callable[[Hold], None]):
        self.folder, self.log = folder, folder / "client.log"
        context = multiprocessing.get_context("spawn")
        self.hold = Hold(context)
        self._pool = ProcessPoolExecutor(1, context, initializer=_begin, initargs=(str(self.log), prepare, self.hold))
        self._pool.submit(os.getpid)  # it prepares itself while the first server starts

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        # After Ctrl-C or a failure the child may be in a wave that never ends.
        for child in list(self._pool._processes.values()) if kind else []:
            child.kill()
        self._pool.shutdown(wait=kind is None, cancel_futures=True)

    def submit(self, function: Callable[..., Any], *args: object) -> Future:
        """Call a function of a module in the process."""
        return self._pool.submit(function, *args)

    def result(self, running: Future, server: ServerProcess) -> Any:
        """What the call returns. Raises ServerFailed when the server ended meanwhile, BenchError when the generator failed."""
        while not wait([running], timeout=1.0).done:
            server.check_alive()
        if error := running.exception():
            raise BenchError(f"bench_serving failed: {error} (log: {self.log})") from error
        return running.result()


class LoadClient(GeneratorProcess):
    """Runs waves against servers, one after another. folder: also holds the results."""

    def __init__(self, folder: Path):
        super().__init__(folder, bench_generator.prepare)
        self._waves = 0

    def run(self, server: ServerProcess, wave: Wave, model: str, tokenizer: str) -> dict[str, Any]:
        """Send the wave; returns the generator's result. The scheduler finds a wave that goes out at once complete in its queue.

        Raises ServerFailed when the server ended meanwhile, BenchError when the generator failed or a request did.
        """
        self._waves += 1
        self.hold.reset()
        arguments, output = wave.arguments(server.url, model, tokenizer), self.folder / f"wave-{self._waves}.jsonl"
        if wave.concurrency is None:
            running = self._start_held(server, wave, arguments, output)
        else:
            running = self.submit(bench_generator.send_wave, arguments, output)
        result = self.result(running, server)
        if result["completed"] != wave.requests:
            raise BenchError(f"{result['completed']} of {wave.requests} requests were answered (log: {self.log})")
        return result

    def _start_held(self, server: ServerProcess, wave: Wave, arguments: list[str], output: Path) -> Future:
        server.pause_scheduler()
        try:
            running = self.submit(bench_generator.send_wave, arguments, output)
            deadline = time.monotonic() + ACCEPT_TIMEOUT_S
            while self.hold.accepted.value < wave.requests and not running.done():
                server.check_alive()
                if time.monotonic() > deadline:
                    raise BenchError(f"the server took {self.hold.accepted.value} of {wave.requests} requests in {ACCEPT_TIMEOUT_S:.0f} s")
                time.sleep(0.01)
            time.sleep(SETTLE_S)
        finally:
            self.hold.released.value = time.perf_counter()
            server.resume_scheduler()
        return running


def _begin(log: str, prepare: Callable[[Hold], None], hold: Hold) -> None:
    """In the child."""
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    prepare(hold)
