"""The plan of a load A/B: model, KV budget, arms and workloads, read from YAML and checked before anything starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sgl_hq.config import AUTO, PACK_POLICIES, HQConfig
from sgl_hq.launch.load_ab.workload_spec import WorkloadSpec
from sgl_hq.launch.load_ab.workloads import parse_workload
from sgl_hq.page_format import PAGE_TOKENS

DEMO, DUMMY = "demo", "qwen2.5-7b-dummy"
# What the harness sets itself, the same for all arms or from the budget; an arm's `args` may not change them behind its back.
RESERVED = (
    "--model", "--model-path", "--tokenizer-path", "--load-format", "--host", "--port", "--device", "--max-total-tokens",
    "--mem-fraction-static", "--page-size", "--kv-cache-dtype", "--attention-backend", "--radix-eviction-policy",
    "--disable-radix-cache", "--enable-hierarchical-cache", "--hicache-size", "--hicache-ratio", "--random-seed",
    "--enable-metrics", "--enable-cache-report", "--decode-log-interval", "--stream-interval", "--skip-server-warmup", "--tp", "--tp-size",
)  # fmt: skip


class PlanError(RuntimeError):
    """A plan that cannot be run; the message names the key and says what to do."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ArmSpec(_Strict):
    """One server. Without `format` it is SGLang alone; the keys that begin with `hq_` and `allow_ungated` need one."""

    name: str = Field(pattern=r"^[\w.+-]+$", description="how rows and tables call this arm")
    format: str | None = Field(default=None, description="of our packed tier, or exact; none: SGLang alone")
    kv_cache_dtype: Literal["auto", "fp8_e4m3", "fp8_e5m2", "fp4_mx_block16"] = Field(default="auto", description="auto: bfloat16")
    hicache_gib: float | None = Field(default=None, gt=0, description="host memory of HiCache in GiB, beside the device's budget")
    radix_eviction_policy: Literal["lru", "lfu", "slru"] = "lru"
    attention_backend: str | None = Field(default=None, description="default: flashinfer on a GPU, triton for fp4")
    page_size: Literal[1, 64] = PAGE_TOKENS
    hq_pack: Literal[PACK_POLICIES] = "shared"
    hq_packed_fraction: Annotated[float, Field(gt=0, lt=1)] | Literal[AUTO] = Field(
        default=HQConfig.packed_fraction, description="auto: memory moves between the tiers; or the share of the budget for packed pages"
    )
    allow_ungated: bool = Field(default=False, description="serve a format that has not passed the quality gate on this model")
    args: tuple[str, ...] = Field(default=(), description="further server arguments, word by word")

    @model_validator(mode="after")
    def _fits_together(self) -> ArmSpec:
        ours = sorted(self.model_fields_set & {"hq_pack", "hq_packed_fraction", "allow_ungated"})
        if self.format is None and ours:
            raise ValueError(f"{', '.join(ours)} belong to our formats: add format, or take them out")
        if self.format is not None and (self.kv_cache_dtype != "auto" or self.hicache_gib or self.page_size != PAGE_TOKENS):
            raise ValueError("format goes with bfloat16 dense pages of 64 tokens and without HiCache: give those an arm of their own")
        taken = [word for word in self.args if word.startswith("--hq-") or word.partition("=")[0] in RESERVED]
        if taken:
            raise ValueError(f"args may not set {taken[0]}: use the plan's own keys, the harness sets the rest alike for all arms")
        return self


class Plan(_Strict):
    """`workloads` are kept as given; `parse_workload` has checked each (`specs`)."""

    about: str = Field(default="", description="what this plan is for")
    model: str = Field(default=DEMO, description=f"folder or hub name, {DEMO}, or {DUMMY}: the shape of Qwen2.5-7B, dummy weights")
    tokenizer: Path | None = Field(default=None, description=f"for {DUMMY}; default: the demo model's")
    kv_gib: float | None = Field(default=None, gt=0, description="KV budget of every arm in GiB; or kv_tokens")
    kv_tokens: int | None = Field(default=None, ge=1024, description="the same budget as a number of bf16 tokens")
    concurrency: int = Field(ge=2, le=4096, description="requests in flight at a time; with a rate or arrival times: no limit")
    rate: float | None = Field(default=None, gt=0, description="Poisson arrivals, requests a second")
    seed: int = 0
    repeats: int = Field(default=1, ge=1, le=100, description="each with another seed: seed, seed + 1, ...")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    arms: tuple[ArmSpec, ...] = Field(min_length=1)
    workloads: tuple[dict[str, Any], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits_together(self) -> Plan:
        if (self.kv_gib is None) == (self.kv_tokens is None):
            raise ValueError("give kv_gib or kv_tokens, and not both: all arms get this one budget")
        for what, names in (("arms", [arm.name for arm in self.arms]), ("workloads", [load.get("name") for load in self.workloads])):
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{what} has {twice[0]} twice: give each a name of its own")
        return self

    def specs(self) -> list[WorkloadSpec]:
        """Raises WorkloadError."""
        return [parse_workload(dict(load)) for load in self.workloads]

    def describe(self) -> dict[str, Any]:
        """As plain JSON values, files and folders by their last name: what a result states, on whatever machine."""
        plain = self.model_dump(mode="json")
        plain["workloads"] = [spec.model_dump(mode="json") for spec in self.specs()]
        for spec in plain["workloads"]:
            spec |= {key: Path(spec[key]).name for key in ("text", "trace", "data") if spec.get(key)}
        return plain | {"model": Path(self.model).name, "tokenizer": self.tokenizer and self.tokenizer.name}

    def digest(self) -> str:
        """sha256 of `describe`: rows of two plans are never mixed."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()


def load_plan(where: str) -> Plan:
    """A YAML file, or the name of a plan of this package. Raises PlanError or WorkloadError."""
    path = Path(where)
    shipped = files("sgl_hq.launch.load_ab") / "plans" / f"{where}.yaml"
    if not path.is_file() and not shipped.is_file():
        raise PlanError(f"There is no plan {where}: give a YAML file or one of {', '.join(shipped_plans())}")
    try:
        given = yaml.safe_load(path.read_text() if path.is_file() else shipped.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PlanError(f"{where} cannot be read as YAML ({' '.join(str(error).split())}): mend the file") from error
    if not isinstance(given, dict):
        raise PlanError(f"{where} holds no keys: a plan is a mapping with arms and workloads")
    return parse_plan(given)


def parse_plan(given: dict[str, Any]) -> Plan:
    """Raises PlanError, one clause for each wrong key, or WorkloadError."""
    try:
        plan = Plan.model_validate(given)
    except ValidationError as error:
        raise PlanError(f"The plan is wrong at {'; at '.join(_clause(each) for each in error.errors())}") from error
    plan.specs()
    return plan


def shipped_plans() -> list[str]:
    return sorted(entry.name.removesuffix(".yaml") for entry in (files("sgl_hq.launch.load_ab") / "plans").iterdir())


def select(what: str, wanted: str | None, names: Sequence[str]) -> list[str]:
    """Comma-separated `wanted` in the plan's order, all without it; raises PlanError that names the unknown one."""
    if wanted is None:
        return list(names)
    asked = {name.strip() for name in wanted.split(",") if name.strip()}
    if unknown := sorted(asked - set(names)) or (not asked and ["(none)"]):
        raise PlanError(f"--{what}: {', '.join(unknown)} is not in the plan: choose from {', '.join(names)}")
    return [name for name in names if name in asked]


def _clause(error: Any) -> str:
    path = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in error["loc"]).lstrip(".") or "its keys"
    if error["type"] == "extra_forbidden":
        model = ArmSpec if error["loc"][0] == "arms" else Plan
        return f"{path}: unknown, known are {', '.join(model.model_fields)}"
    return f"{path}: {error['msg'].removeprefix('Value error, ')}"
