"""Gate records: what a full gate run found out about one format on one model, as a JSON file.

    cache_folder()/gates/<model digest>/<format>.json     written by `sgl-hq gate`; looked up first
    sgl_hq/gate/records/<model digest>/<format>.json      shipped for the demo models

A record is believed only if it is whole: figures and verdict are computed again from its trials.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sgl_hq.config import cache_folder
from sgl_hq.gate.bounds import GATE_VERSION, PREFIX_TOKENS, STEPS
from sgl_hq.gate.figures import Trial, summarize
from sgl_hq.gate.windows import CORE, HOLD_OUT, shipped_digest
from sgl_hq.json_file import write_json
from sgl_hq.page_format import LAYOUT_VERSION

SHIPPED = Path(__file__).parent / "records"


class RecordError(ValueError):
    """This record says nothing about the model and format as they are now. The text says why, without a remedy."""


@dataclass(frozen=True)
class GateRecord:
    """One full gate run of one format. trials: every shipped window at every prefix of the gate."""

    model: str  # as the user named it; for reading only
    model_digest: str
    format: str
    trials: tuple[Trial, ...]
    date: str  # ISO 8601, UTC
    versions: dict[str, str]  # of torch, transformers and sgl_hq
    layout_version: int = LAYOUT_VERSION
    gate_version: int = GATE_VERSION
    windows_digest: str = ""
    calibration: str = ""  # digest of the calibration that a calibrated format was made from

    def to_json(self) -> dict[str, Any]:
        head = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "trials"}
        figures = finite_or_null(summarize(self.trials))
        return head | {"figures": figures, "trials": [finite_or_null(asdict(t)) for t in self.trials]}


def own_records() -> Path:
    return cache_folder() / "gates"


def record_path(root: Path, model_digest: str, fmt: str) -> Path:
    return root / model_digest / f"{fmt}.json"


def write_record(record: GateRecord, root: Path) -> Path:
    """The file appears whole or not at all. Raises OSError."""
    path = record_path(root, record.model_digest, record.format)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(record.to_json(), path)
    return path


def read_record(path: Path, model_digest: str, fmt: str, calibration: str = "") -> GateRecord:
    """The record in `path`, checked against this model, format, calibration and version. Raises RecordError,
    FileNotFoundError."""
    try:
        data = json.loads(path.read_text())
        figures = data.pop("figures")
        trials = tuple(Trial(**_null_to_infinite(row)) for row in data.pop("trials"))
        record = GateRecord(**data, trials=trials)
        found = finite_or_null(summarize(trials))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise RecordError(f"{path} cannot be read ({error})") from error
    for what, theirs, ours in (
        ("model", record.model_digest, model_digest),
        ("format", record.format, fmt),
        ("calibration", record.calibration, calibration),
        ("page layout version", record.layout_version, LAYOUT_VERSION),
        ("gate version", record.gate_version, GATE_VERSION),
        ("set of windows", record.windows_digest, shipped_digest()),
    ):
        if theirs != ours:
            raise RecordError(f"{path} is of {what} {theirs}, not {ours}")
    if not is_full(trials):
        raise RecordError(f"{path} holds {len(trials)} trials, not all those of the full gate")
    if figures != found:
        raise RecordError(f"{path} states figures that its own trials do not give")
    return record


def is_full(trials: tuple[Trial, ...]) -> bool:
    """Exactly the shipped windows, at exactly the gate's prefixes, with at least its steps."""
    expected = sorted((window, n) for window in (*CORE, *HOLD_OUT) for n in PREFIX_TOKENS)
    return sorted((t.window, t.prefix_tokens) for t in trials) == expected and all(t.steps >= STEPS for t in trials)


def finite_or_null(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: a figure of logits that are not finite becomes null."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}


def _null_to_infinite(row: dict[str, Any]) -> dict[str, Any]:
    return {key: math.inf if value is None else value for key, value in row.items()}
