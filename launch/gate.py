"""`sgl-hq gate`: measure formats on a model, show the figures, keep records that the server asks for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sgl_hq.calibration.store import calibration_path
from sgl_hq.gate.bounds import GATE_VERSION, PREFIX_TOKENS, QUICK_PREFIX_TOKENS, STEPS
from sgl_hq.gate.errors import GateError
from sgl_hq.gate.figures import Trial, summarize
from sgl_hq.gate.model_digest import model_digest
from sgl_hq.gate.record import GateRecord, finite_or_null, own_records, write_record
from sgl_hq.gate.windows import CORE, Window, shipped_digest, shipped_windows, windows_of_files
from sgl_hq.json_file import write_json
from sgl_hq.launch.gate_report import json_object, sentences, smallest_passing, table
from sgl_hq.page_format import DEFAULT_LOSSY, LAYOUT_VERSION, calibrated_bits, is_lossy

if TYPE_CHECKING:
    from sgl_hq.prefix_codec import PrefixCodec

PASSED, FAILED = 0, 3  # exit codes; an error has any other


@dataclass(frozen=True)
class Plan:
    """What to measure, resolved."""

    model: str
    formats: tuple[str, ...]
    prefixes: tuple[int, ...]
    steps: int
    windows: tuple[Window, ...]

    @property
    def full(self) -> bool:
        """The gate itself: every shipped text and prefix, no step fewer. Only this gives a record."""
        return (self.windows, tuple(sorted(self.prefixes))) == (shipped_windows(), PREFIX_TOKENS) and self.steps >= STEPS


def run(
    model: str | None = None,
    formats: list[str] | None = None,
    all_presets: bool = False,
    prefixes: list[int] | None = None,
    steps: int | None = None,
    windows: list[Path] | None = None,
    quick: bool = False,
    device: str = "cpu",
    revision: str | None = None,
    json_path: Path | None = None,
    record_dir: Path | None = None,
) -> int:
    """Measure, print, write; None takes the default (`quick` has smaller ones).

    Returns PASSED or FAILED: of every format asked for, with `all_presets` of at least one. Raises GateError,
    ModelDigestError or DemoModelError when there is no verdict; nothing is written then.
    """
    from sgl_hq.gate import run as gate_run
    from sgl_hq.gate.codecs import codec_of, lossy_presets

    if all_presets and formats:
        raise GateError("--all measures every preset that loses bits: leave out --format")
    plan = Plan(
        model=model or _demo_model(),
        formats=tuple(lossy_presets() if all_presets else dict.fromkeys(formats or [DEFAULT_LOSSY])),
        prefixes=tuple(prefixes or (QUICK_PREFIX_TOKENS if quick else PREFIX_TOKENS)),
        steps=STEPS if steps is None else steps,
        windows=windows_of_files(windows) if windows else shipped_windows(CORE) if quick else shipped_windows(),
    )
    records = record_dir or own_records()
    if json_path is not None and not json_path.resolve().parent.is_dir():
        raise GateError(f"--json: there is no directory {json_path.resolve().parent}")
    if plan.full:
        _make_folder(records)
    needs_calibration = any(calibrated_bits(name) is not None for name in plan.formats)
    calibration = calibration_path(model_digest(plan.model, revision)) if needs_calibration else None
    codecs = [codec_of(name, calibration, device) for name in plan.formats]
    gate_run.check_sizes(plan.prefixes, plan.steps)
    began = time.monotonic()
    with _progress(plan) as (on_window, advance):
        loaded = gate_run.load_model(plan.model, device, revision)
        digest = model_digest(plan.model, revision)
        trials = gate_run.measure(loaded, plan.windows, plan.prefixes, plan.steps, codecs, on_window, advance)
    facts = _facts(plan, digest, device, time.monotonic() - began)
    if json_path is not None:
        rows = {name: [finite_or_null(asdict(t)) for t in found] for name, found in trials.items()}
        write_json(_finite(json_object(facts, trials, rows)), json_path)
    return _conclude(plan, digest, trials, codecs, all_presets, records, facts)


def _conclude(
    plan: Plan,
    digest: str,
    trials: dict[str, tuple[Trial, ...]],
    codecs: Sequence[PrefixCodec],
    all_presets: bool,
    records: Path,
    facts: dict[str, Any],
) -> int:
    """Show everything on stdout and write the records of a full run."""
    from sgl_hq.prefix_codec import ServedCodec

    console = Console()
    summaries = {name: summarize(found) for name, found in trials.items()}
    bits_at = next(iter(summaries.values()))["bits_at_prefix_tokens"]
    title = f"{plan.model}: {len(plan.windows)} texts, prefixes {', '.join(map(str, plan.prefixes))}, {plan.steps} steps"
    shown = table(summaries, title)
    console.width = max(console.width, Console(width=1000).measure(shown).maximum)  # never cut, also in a file
    console.print(shown)
    say = lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)  # noqa: E731
    say(f"Both arms compute in float32. Bits at a prefix of {bits_at:,} tokens. {facts['seconds']:.0f} s.")
    for line in sentences(summaries, trials):
        say(line)
    served = [codec for codec in codecs if isinstance(codec, ServedCodec) and is_lossy(codec.name)]
    for codec in served if plan.full else []:
        record = GateRecord(
            model=Path(plan.model).name, model_digest=digest, format=codec.name, trials=trials[codec.name],
            date=facts["date"], versions=facts["versions"], windows_digest=shipped_digest(),
            calibration=getattr(codec, "calibration_digest", ""),
        )  # fmt: skip
        say(f"record: {write_record(record, records)}")
    if not plan.full:
        say(
            "This is not a verdict for serving, and no record is written: the server asks for all shipped texts at prefixes "
            f"{', '.join(map(str, PREFIX_TOKENS))} (leave out --quick, --windows, --prefix and --steps)."
        )
    smallest = smallest_passing(summaries)
    if all_presets:
        answer = f"{smallest} ({summaries[smallest]['stored_bits']:.2f} stored bits)" if smallest else "none"
        say(f"Smallest format that passes on this model: {answer}")
        return PASSED if smallest else FAILED
    return PASSED if all(summary["verdict"] == "pass" for summary in summaries.values()) else FAILED


def _facts(plan: Plan, digest: str, device: str, seconds: float) -> dict[str, Any]:
    return {
        "model": Path(plan.model).name,  # a result file names no folder of this machine
        "model_digest": digest,
        "gate_version": GATE_VERSION,
        "layout_version": LAYOUT_VERSION,
        "windows": [window.name for window in plan.windows],
        "prefixes": list(plan.prefixes),
        "steps_per_trial": plan.steps,
        "device": device,
        "versions": {name: version(name) for name in ("torch", "transformers", "sgl-hq")},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
    }


def _finite(value: dict[str, Any]) -> dict[str, Any]:
    """`finite_or_null` for a JSON object and the formats listed in it."""
    nested = {"formats": [finite_or_null(entry) for entry in value["formats"]]} if "formats" in value else {}
    return finite_or_null(value) | nested


@contextmanager
def _progress(plan: Plan):
    """Yields (on_window, advance). A bar with the time left on stderr; where that is no terminal, a line per window."""
    from sgl_hq.gate.run import total_cost

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    total = total_cost(len(plan.windows), len(plan.prefixes), len(plan.formats))
    bars = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, speed_estimate_period=600)
    task = bars.add_task("loading the model", total=total)
    done, began = 0, time.monotonic()

    def on_window(name: str) -> None:
        nonlocal began
        bars.update(task, description=name)
        if not done:
            began = time.monotonic()  # the time left is of measuring, not of loading
        if not console.is_terminal:
            left = f", about {(time.monotonic() - began) * (total / done - 1):.0f} s left" if done else ""
            console.print(f"{name}{left}", highlight=False)

    def advance(cost: int) -> None:
        nonlocal done
        done += cost
        bars.advance(task, cost)

    with bars:
        yield on_window, advance


def _make_folder(folder: Path) -> None:
    """Before the minutes of measuring, not after them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GateError(f"cannot keep records in {folder} ({error.strerror}): give another --record-dir") from error


def _demo_model() -> str:
    from sgl_hq.launch.demo_model import ensure_demo_model

    return str(ensure_demo_model())
