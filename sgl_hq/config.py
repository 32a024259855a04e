"""The options of HypercubeQuant: one frozen record that validates itself. Sole reader of `SGLANG_HQ_*`.

SGLang starts its scheduler in a child process that inherits the environment and nothing else of ours,
so the environment is the carrier: the command-line flags (`patches/server_args.py`) only write it.
SGLang itself renames `SGL_*` variables to `SGLANG_*` with a warning (`environ.py`), so `SGL_HQ_FORMAT` works too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Mapping

from sgl_hq.page_format import CALIBRATED_GRAMMAR, FAMILY_GRAMMAR, FORMATS, PAGE_TOKENS, check_format_name

EXACT = "exact"
AUTO = "auto"  # of packed_fraction
CPU_PLATFORM = "sgl_hq_cpu"  # value of SGLANG_PLATFORM that selects our CPU platform; the entry point's name
PACK_POLICIES = ("shared", "insert", "pressure")
SERVING_FORMATS = (EXACT, *FORMATS)

ENV_OF_FIELD = {
    "format": "SGLANG_HQ_FORMAT",
    "pack": "SGLANG_HQ_PACK",
    "packed_fraction": "SGLANG_HQ_PACKED_FRACTION",
    "page_size": "SGLANG_HQ_PAGE_SIZE",
    "allow_ungated": "SGLANG_HQ_ALLOW_UNGATED",
    "audit": "SGLANG_HQ_AUDIT",
    "audit_raise": "SGLANG_HQ_AUDIT_RAISE",
}
SWITCHES = ("allow_ungated", "audit_raise")  # flags without a value; 1 or 0 in the environment
_CACHE_VARIABLE = "SGLANG_HQ_CACHE"


class HQConfigError(ValueError):
    """An option or a combination that cannot be served. The message is one sentence with the remedy."""


@dataclass(frozen=True)
class HQConfig:
    """Resolved options.

    format: `exact` (no page is transformed) or a page format that `page_format.check_format_name` knows.
    pack: when a dense page is packed: `shared` (a second request uses it), `insert` (as soon as it is in
        the radix tree), `pressure` (only instead of being evicted, which
        the other two do as well).
    packed_fraction: `auto`: memory moves between the tiers as the load wants it; or the share of the KV byte budget that the packed tier
        has for good, 0 < f < 1; `exact` uses none of it.
    page_size: tokens per page; K is scaled per channel over a page, so the format fixes it at 64.
    allow_ungated: serve a format that loses bits without a passing record of the quality gate for this model.
    audit: check books and packed bytes every so many batches, for debugging; 0: never.
    audit_raise: end the server when an audit finds something, instead of logging it.
    """

    format: str
    pack: str = "shared"
    packed_fraction: float | str = AUTO
    page_size: int = PAGE_TOKENS
    allow_ungated: bool = False
    audit: int = 0
    audit_raise: bool = False

    def __post_init__(self):
        try:
            if self.format != EXACT:
                check_format_name(self.format)
        except ValueError:
            raise HQConfigError(
                f"unknown --hq-format {self.format!r}: choose one of {', '.join(SERVING_FORMATS)} "
                f"(`sgl-hq formats` explains them), {FAMILY_GRAMMAR}, or {CALIBRATED_GRAMMAR}"
            ) from None
        if self.pack not in PACK_POLICIES:
            raise HQConfigError(f"unknown --hq-pack {self.pack!r}: choose one of {', '.join(PACK_POLICIES)}")
        if self.packed_fraction != AUTO and not 0.0 < self.packed_fraction < 1.0:
            raise HQConfigError(
                f"--hq-packed-fraction {self.packed_fraction:g} leaves one tier without memory: "
                f"give a number between 0 and 1, for example 0.5, or {AUTO}"
            )
        if self.page_size != PAGE_TOKENS:
            raise HQConfigError(
                f"--hq-page-size {self.page_size} is not supported: packed pages hold {PAGE_TOKENS} tokens, use {PAGE_TOKENS}"
            )
        if self.audit < 0:
            raise HQConfigError(f"--hq-audit {self.audit} is no number of batches: give for example 16, or 0 for no audit")
        if self.audit_raise and not self.audit:
            raise HQConfigError("--hq-audit-raise without an audit does nothing: add --hq-audit, for example 16, or drop it")

    @property
    def packs(self) -> bool:
        """True when pages may move to the packed tier."""
        return self.format != EXACT

    @property
    def elastic(self) -> bool:
        """True when memory moves between the tiers."""
        return self.packs and self.packed_fraction == AUTO

    def describe(self) -> dict[str, str]:
        """Every resolved value, in the order a reader wants them."""
        return {f.name: _text(getattr(self, f.name)) for f in fields(self)}

    def to_env(self) -> dict[str, str]:
        return {ENV_OF_FIELD[f.name]: _text(getattr(self, f.name)) for f in fields(self)}


def cache_folder() -> Path:
    """Demo models and gate records: $SGLANG_HQ_CACHE, else $XDG_CACHE_HOME/sgl_hq, else ~/.cache/sgl_hq. Not created here."""
    if own := os.environ.get(_CACHE_VARIABLE):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "sgl_hq"


def from_env(env: Mapping[str, str] | None = None) -> HQConfig | None:
    """The configuration asked for by the environment, or None when none is (SGLang stays vanilla).

    Raises HQConfigError on unknown `SGLANG_HQ_*` names that look like options, on values that do not parse, and on
    options given without `SGLANG_HQ_FORMAT`: a misspelt knob must not silently serve the default.
    """
    env = os.environ if env is None else env
    given = {field: env[name] for field, name in ENV_OF_FIELD.items() if env.get(name, "") != ""}
    known = set(ENV_OF_FIELD.values()) | {_CACHE_VARIABLE}
    unknown = sorted(name for name in env if name.startswith("SGLANG_HQ_") and name not in known)
    if unknown:
        raise HQConfigError(f"unknown environment variable {unknown[0]}: known are {', '.join(sorted(known))}")
    if not given:
        return None
    if "format" not in given:
        raise HQConfigError(
            f"{', '.join(ENV_OF_FIELD[f] for f in given)} is set but no format is: "
            f"add --hq-format (one of {', '.join(SERVING_FORMATS)}) or unset it"
        )
    return from_strings(given)


def from_strings(given: Mapping[str, str]) -> HQConfig:
    """Parse text values by field name. Raises HQConfigError."""
    values: dict[str, object] = dict(given)
    for name, kind, example in (("packed_fraction", _fraction, "0.5"), ("page_size", int, "64"), ("audit", int, "16")):
        if name in values:
            try:
                values[name] = kind(values[name])
            except ValueError:
                flag = "--hq-" + name.replace("_", "-")
                raise HQConfigError(f"{flag} {given[name]!r} is not a number: give for example {example}") from None
    for name in SWITCHES:
        if name in values:
            if given[name] not in ("0", "1"):
                raise HQConfigError(f"{ENV_OF_FIELD[name]}={given[name]} is not understood: set it to 1 or unset it")
            values[name] = given[name] == "1"
    return HQConfig(**values)


def parse_packed_fraction(text: str) -> float | str:
    """`packed_fraction` of an HQConfig. Raises HQConfigError for what is neither a number nor `auto`."""
    return from_strings({"format": EXACT, "packed_fraction": text}).packed_fraction


def _fraction(text: str) -> float | str:
    return AUTO if text == AUTO else float(text)


def _text(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)
