"""What the user sees on stderr meanwhile: one bar for the whole comparison, one line for each part that has ended."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# A server start takes about as long as this many waves of the quick workload.
START_STEPS = 12
_STEP_S = 3.0


class ABProgress:
    """Progress over `arms` server starts and `waves` waves in each arm; a context manager."""

    def __init__(self, arms: int, waves: int):
        self._console = Console(stderr=True)
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._bar = self._bars.add_task("", total=arms * (START_STEPS + waves))
        self._done = 0.0

    def __enter__(self) -> ABProgress:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()

    def doing(self, what: str) -> None:
        """Name what runs now."""
        self._bars.update(self._bar, description=what)

    def starting(self, waited_s: float) -> None:
        """Move the bar during a server start, never past the start's own share."""
        self._bars.update(self._bar, completed=self._done + min(waited_s / _STEP_S, START_STEPS - 1))

    def step(self, steps: int = 1) -> None:
        """`steps` waves, or one start of START_STEPS, have ended."""
        self._done += steps
        self._bars.update(self._bar, completed=self._done)

    def note(self, line: str) -> None:
        """A line that stays, also where stderr is no terminal."""
        self._console.print(line, highlight=False)
