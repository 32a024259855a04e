"""May this format be served on this model? What the server asks before it loads a weight."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace

from sgl_hq.calibration.store import CalibrationError, calibration_path, read_calibration
from sgl_hq.config import HQConfig, HQConfigError
from sgl_hq.gate.figures import failing_bounds, summarize
from sgl_hq.gate.model_digest import ModelDigestError, model_digest
from sgl_hq.gate.record import SHIPPED, GateRecord, RecordError, own_records, read_record, record_path
from sgl_hq.page_format import calibrated_bits, is_lossy

_ALLOW = "--hq-allow-ungated"


@dataclass(frozen=True)
class GateState:
    """verdict: `not needed` (no bit is lost), `passed`, `failed`, or `ungated` (nothing valid is known).

    reason: why not passed, with the remedy, as one sentence; empty otherwise. date: of the record, if there is one.
    calibration: path of the file that a calibrated format needs, else None.
    """

    verdict: str
    reason: str = ""
    date: str = ""
    calibration: str | None = None

    @property
    def admits(self) -> bool:
        return self.verdict in ("not needed", "passed")

    def describe(self) -> dict[str, str]:
        """For /server_info: plain text values."""
        return {"verdict": self.verdict, "reason": self.reason, "date": self.date}


def gate_state(
    config: HQConfig, model: str, revision: str | None = None, load_format: str = "auto", overrides: str = "{}"
) -> GateState:
    """What is known of `config.format` on the checkpoint `model` (folder or hub name).

    load_format, overrides: SGLang's --load-format and --json-model-override-args; a record is of the stored checkpoint.
    Raises HQConfigError for a calibrated format without a usable calibration: nothing could be packed.
    """
    if calibrated_bits(config.format) is None:
        return _gate_state(config, model, revision, load_format, overrides)
    if load_format == "dummy":
        raise HQConfigError(f"format {config.format} needs a calibrated checkpoint, --load-format dummy has none: use another format")
    try:
        path = calibration_path(model_digest(model, revision))
        calibration = read_calibration(path, model)
    except (ModelDigestError, CalibrationError) as error:
        raise HQConfigError(f"format {config.format} cannot be served: {error}") from error
    state = _gate_state(config, model, revision, load_format, overrides, calibration.digest)
    return replace(state, calibration=str(path))


def _gate_state(
    config: HQConfig, model: str, revision: str | None, load_format: str, overrides: str, calibration: str = ""
) -> GateState:
    if not config.packs or not is_lossy(config.format):
        return GateState("not needed")
    name, command = config.format, f"sgl-hq gate --model {shlex.quote(model)} --format {config.format}"
    if load_format == "dummy":
        return _ungated(f"--load-format dummy serves random weights, so format {name} cannot have passed the quality gate")
    if overrides.strip() not in ("", "{}"):
        return _ungated(f"--json-model-override-args changes the model that the quality gate of {name} would be of")
    try:
        digest = model_digest(model, revision)
    except ModelDigestError as error:
        return _ungated(f"format {name} loses bits and its quality gate cannot be looked up, as {error}")
    record, problem = _find(digest, name, calibration)
    if record is None:
        found = f": {problem}" if problem else ""
        return _ungated(f"format {name} has no valid quality gate record for this model{found}", f"run `{command}`")
    figures = summarize(record.trials)
    if figures["verdict"] == "pass":
        return GateState("passed", date=record.date)
    reason = (
        f"format {name} failed the quality gate on this model ({'; '.join(failing_bounds(figures))}; "
        f"{figures['strict_trials']} of {figures['trials']} trials passed): `sgl-hq gate --all --model {shlex.quote(model)}` "
        f"finds the smallest format that passes, {_ALLOW} serves this one anyway"
    )
    return GateState("failed", reason, record.date)


def require(config: HQConfig, state: GateState) -> None:
    """Raises HQConfigError unless the gate admits the format or the user does."""
    if not state.admits and not config.allow_ungated:
        raise HQConfigError(state.reason)


def _ungated(why: str, remedy: str = "") -> GateState:
    return GateState("ungated", f"{why}: {remedy + ', or ' if remedy else ''}add {_ALLOW} to serve it all the same")


def _find(digest: str, fmt: str, calibration: str) -> tuple[GateRecord | None, str]:
    """The user's own record, else the shipped one; else the first reason why one that exists does not count."""
    problem = ""
    for root in (own_records(), SHIPPED):
        try:
            return read_record(record_path(root, digest, fmt), digest, fmt, calibration), ""
        except FileNotFoundError:
            continue
        except RecordError as error:
            problem = problem or str(error)
    return None, problem
