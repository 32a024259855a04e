"""A thread that takes samples while a `with` block runs."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class SamplingThread(ABC):
    """Calls `take` every `every_s` seconds; the first of `failures` ends it and is kept in `failure`."""

    def __init__(self, every_s: float, failures: tuple[type[Exception], ...]):
        self._every_s, self._failures = every_s, failures
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-sampler", daemon=True)
        self.failure: Exception | None = None

    @abstractmethod
    def take(self) -> None:
        """One sample."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                self.take()
            except self._failures as failure:
                self.failure = failure
                return
