"""One SGLang server as a child process: start it, wait for it, ask it, stop it, leave nothing running.

The server gets its own session (and with it its own process group), a log file and a free port. `start()` waits for
`GET /health` and watches for an early exit: then `ServerFailed` carries the reason from the log, not only "exit code 1".
`stop()` is what `with` calls on every way out, Ctrl-C included: SIGTERM, a grace time, then SIGKILL for the group and for
every descendant that left it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from sgl_hq.config import CPU_PLATFORM
from sgl_hq.launch.port_claim import HOST, PortClaim
from sgl_hq.launch.prometheus_text import Sample, read_samples
from sgl_hq.launch.server_log import failure_reason
from sgl_hq.launch.thread_freeze import freeze, thaw

# SGLang names its scheduler processes with setproctitle (sglang/srt/managers/scheduler.py).
SCHEDULER_TITLE = "sglang::scheduler"
# How long a server may take to leave after SIGTERM before it is killed.
STOP_GRACE_S = 10.0


class ServerFailed(RuntimeError):
    """The server did not start, ended early or did not answer; the message ends with the reason from its log."""


class ServerProcess:
    """A `python -m sglang.launch_server` process as a context manager.

    Args:
        model: model directory or hub name; a directory also sets HF_HUB_OFFLINE=1.
        args: further server arguments, as on the command line.
        env: environment variables added to this process's own.
        log_path: file for stdout and stderr of the server; None takes a file in the temporary directory.
        port: HTTP port; None takes one that nobody has or gets before the server binds it (`port_claim.py`).
        cpu: serve on the CPU: `--device cpu` and our CPU platform, which vanilla needs as well.
        start_timeout_s: seconds until `GET /health` must have answered 200.
        stop_grace_s: seconds to leave after SIGTERM before SIGKILL; 0 when nothing is in flight any more, since SGLang's
            drain looks for running requests every 5 s only.
        on_wait: called several times a second during the start with the seconds waited so far.
    """

    def __init__(
        self,
        model: str,
        args: Sequence[str] = (),
        *,
        env: Mapping[str, str] | None = None,
        log_path: Path | None = None,
        port: int | None = None,
        cpu: bool = True,
        start_timeout_s: float = 300.0,
        stop_grace_s: float = STOP_GRACE_S,
        on_wait: Callable[[float], None] = lambda seconds: None,
    ):
        self.model = model
        self._claim = PortClaim() if port is None else None
        self.port = port if port is not None else self._claim.port
        self.argv = [sys.executable, "-m", "sglang.launch_server", "--model-path", model]
        self.argv += ["--host", HOST, "--port", str(self.port), *(["--device", "cpu"] if cpu else []), *args]
        self.env = dict(os.environ)
        if cpu:
            self.env["SGLANG_PLATFORM"] = CPU_PLATFORM
        if Path(model).is_dir():
            self.env["HF_HUB_OFFLINE"] = "1"
        self.env.update(env or {})
        self.log_path = log_path if log_path is not None else _temporary_log(self.port)
        self.start_timeout_s = start_timeout_s
        self.stop_grace_s = stop_grace_s
        self.on_wait = on_wait
        self.start_s: float | None = None  # seconds from the start of the process to the first healthy answer
        self._process: subprocess.Popen | None = None
        self._paused: dict[int, Callable[[int], None]] = {}  # scheduler pid -> how to let it go on
        self._seen: dict[int, psutil.Process] = {}  # descendants seen alive, by pid
        self._http = httpx.Client(base_url=self.url, timeout=60.0, trust_env=False)

    @property
    def url(self) -> str:
        """Root address of the server, without a trailing slash."""
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> ServerProcess:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process and return once `GET /health` answers 200.

        Raises:
            ServerFailed: the process ended, the time ran out, or another process listens on the port (the caller, or `with`, then
                calls `stop()`).
        """
        started = time.monotonic()
        with open(self.log_path, "wb") as log:
            self._process = subprocess.Popen(
                self.argv, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        while True:
            self.check_alive()
            # Who answers is asked before /health is: another arm's server, measured by mistake, would give figures of the wrong arm, and
            # without its port SGLang's warm-up waits for an answer for 10 minutes.
            if self._port_answers():
                if not self._listens():
                    raise self._failed(f"is not the one that answers on port {self.port}: another process has taken it; start again")
                if self._healthy():
                    break
            waited = time.monotonic() - started
            if waited > self.start_timeout_s:
                raise self._failed(f"did not answer /health within {self.start_timeout_s:.0f} s")
            self.on_wait(waited)
            time.sleep(0.2)
        self.start_s = time.monotonic() - started

    def stop(self) -> None:
        """End the server and everything it started; calling it again does nothing."""
        if self._process is None:
            return
        self._remember_descendants()
        self.resume_scheduler()  # a stopped process would keep the signal pending
        self._process.terminate()  # only the main process: it drains and ends its children; signalled too, they look crashed
        deadline = time.monotonic() + self.stop_grace_s
        while time.monotonic() < deadline and (self._process.poll() is None or self._alive()):
            time.sleep(0.05)
        self._signal(signal.SIGKILL)
        self._process.wait()
        psutil.wait_procs(self._alive(), timeout=STOP_GRACE_S)
        self._process = None
        self._http.close()
        if self._claim is not None:
            self._claim.release()

    def check_alive(self) -> None:
        """Raise ServerFailed when the server's main process has ended."""
        if self._process is not None:
            self._remember_descendants()
            if self._process.poll() is not None:
                raise self._failed(f"ended with exit code {self._process.returncode}")

    def server_info(self) -> dict[str, Any]:
        """`GET /server_info`. The scheduler answers it: never call it between pause and resume."""
        return self._get("/server_info").json()

    def metrics(self) -> list[Sample]:
        """All samples of `GET /metrics` (needs --enable-metrics). The HTTP process answers, also during a pause."""
        return read_samples(self._get("/metrics").text)

    def flush_cache(self) -> None:
        """Empty the prefix cache; raises ServerFailed when the server refuses because requests are running."""
        self._get("/flush_cache", params={"timeout": 30})

    def freeze_gc(self) -> None:
        """Objects that exist by now are no longer looked through for garbage, as SGLang advises after the warm-up: on a large heap
        that takes some hundred milliseconds at a time nobody chose."""
        self._get("/freeze_gc")

    def pause_scheduler(self) -> None:
        """Hold the thread that builds the batches; requests sent now are taken in, in the order sent, and wait for it.

        Where the system forbids ptrace the whole scheduler process is stopped with SIGSTOP (`thread_freeze.py` has the
        difference). The thread that called this must call `resume_scheduler`.
        """
        self._remember_descendants()
        schedulers = [p.pid for p in self._alive() if SCHEDULER_TITLE in " ".join(p.cmdline())]
        if not schedulers:
            raise self._failed(f"has no process named {SCHEDULER_TITLE}")
        for pid in schedulers:
            try:
                freeze(pid)  # a process's main thread has the process's id
                self._paused[pid] = thaw
            except PermissionError:
                os.kill(pid, signal.SIGSTOP)
                self._paused[pid] = lambda pid: os.kill(pid, signal.SIGCONT)

    def resume_scheduler(self) -> None:
        """Let the scheduler go on; nothing happens when it is not paused."""
        while self._paused:
            pid, resume = self._paused.popitem()
            try:
                resume(pid)
            except ProcessLookupError:
                pass  # it has ended; check_alive() says why

    def log_text(self) -> str:
        """Everything the server has written so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def _healthy(self) -> bool:
        try:
            return self._http.get("/health", timeout=5.0).status_code == 200
        except httpx.HTTPError:
            return False

    def _port_answers(self) -> bool:
        """Somebody takes connections on the port."""
        try:
            socket.create_connection((HOST, self.port), timeout=5.0).close()
        except OSError:
            return False
        return True

    def _listens(self) -> bool:
        """It is our server that takes them."""
        try:
            main = psutil.Process(self._process.pid)
            sockets = [c for p in (main, *main.children(recursive=True)) for c in p.net_connections("tcp")]
        except psutil.Error:  # it has ended
            return False
        return any(c.status == psutil.CONN_LISTEN and c.laddr.port == self.port for c in sockets)

    def _get(self, path: str, **kwargs: Any) -> httpx.Response:
        try:
            response = self._http.get(path, **kwargs)
            response.raise_for_status()
        except httpx.HTTPError as error:
            self.check_alive()
            raise self._failed(f"did not answer {path} ({error})") from error
        return response

    def _failed(self, what: str) -> ServerFailed:
        return ServerFailed(f"The server for {self.model} {what}: {failure_reason(self.log_text())} (log: {self.log_path})")

    def _remember_descendants(self) -> None:
        try:
            for child in psutil.Process(self._process.pid).children(recursive=True):
                self._seen.setdefault(child.pid, child)
        except psutil.NoSuchProcess:
            pass

    def _alive(self) -> list[psutil.Process]:
        # is_running() compares start times, so a reused pid is never taken for ours; zombies need no signal.
        return [p for p in self._seen.values() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def _signal(self, sig: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, sig)
        except ProcessLookupError:
            pass
        for process in self._alive():
            try:
                process.send_signal(sig)
            except psutil.NoSuchProcess:
                pass


def _temporary_log(port: int) -> Path:
    return Path(tempfile.gettempdir()) / f"sgl-hq-server-{os.getpid()}-{port}.log"
