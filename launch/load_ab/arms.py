"""From an arm of the plan to its server: arguments that give every arm the same KV bytes, and what cannot run on this device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sgl_hq.config import EXACT, HQConfig
from sgl_hq.gate import admission
from sgl_hq.launch.bench_model import BenchModel
from sgl_hq.launch.load_ab.plan import ArmSpec, PlanError
from sgl_hq.launch.server_process import ServerProcess
from sgl_hq.launch.server_settings import MEASURED, ON_CPU, ON_GPU, START_TIMEOUT_S
from sgl_hq.page_format import PAGE_TOKENS

BF16_BITS = 16
# Of a dense value, with its scale: fp4_mx_block16 has a byte of scale for 16 values (sglang fp4_kv_cache_quant_method.py).
STORED_BITS = {"auto": BF16_BITS, "fp8_e4m3": 8, "fp8_e5m2": 8, "fp4_mx_block16": 4.5}
GPU_BACKEND, FP4_BACKEND = "flashinfer", "triton"  # flashinfer reads no fp4_mx_block16 (sglang server_args.py)


@dataclass(frozen=True)
class Arm:
    """An arm with the budget it gets. budget_bytes: of all its KV on the device; token_bytes: of one token in bfloat16."""

    spec: ArmSpec
    budget_bytes: int
    bf16_token_bytes: int
    on_cpu: bool

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def packs(self) -> bool:
        return self.spec.format not in (None, EXACT)

    @property
    def token_bytes(self) -> float:
        """KV bytes of a dense token in this arm's KV type."""
        return self.bf16_token_bytes * STORED_BITS[self.spec.kv_cache_dtype] / BF16_BITS

    @property
    def slots(self) -> int:
        """--max-total-tokens. SGLang allocates one page more, for the writes of padding: it is part of the budget.

        With one of our formats the number means the bytes of so many bf16 tokens, for both tiers and the workspaces.
        """
        page = self.spec.page_size
        return int(self.budget_bytes / self.token_bytes) // page * page - page

    @property
    def backend(self) -> str | None:
        """None: the only one there is on a CPU."""
        if self.on_cpu:
            return None
        return self.spec.attention_backend or (FP4_BACKEND if self.spec.kv_cache_dtype == "fp4_mx_block16" else GPU_BACKEND)

    @property
    def hicache_gb(self) -> int | None:
        """What SGLang takes for the host pool: whole gigabytes of 10^9 bytes."""
        return None if self.spec.hicache_gib is None else int(self.spec.hicache_gib * 2**30 / 1e9)

    def server_args(self) -> list[str]:
        """What makes this arm's server, without what all servers share."""
        spec = self.spec
        args = ["--max-total-tokens", str(self.slots), "--page-size", str(spec.page_size), "--kv-cache-dtype", spec.kv_cache_dtype]
        args += ["--radix-eviction-policy", spec.radix_eviction_policy]
        args += ["--attention-backend", self.backend] if self.backend else []
        args += ["--enable-hierarchical-cache", "--hicache-size", str(self.hicache_gb)] if self.hicache_gb else []
        if spec.format is not None:
            args += ["--hq-format", spec.format, "--hq-pack", spec.hq_pack]
            args += ["--hq-packed-fraction", str(spec.hq_packed_fraction)] if self.packs else []
            args += ["--hq-allow-ungated"] if spec.allow_ungated else []
        return [*args, *spec.args]

    def server(self, model: BenchModel, log: Path) -> ServerProcess:
        """The process, not started."""
        args = [*model.server_args, *self.server_args(), *MEASURED, *(ON_CPU if self.on_cpu else ON_GPU)]
        if model.tokenizer != model.path:
            args += ["--tokenizer-path", model.tokenizer]
        return ServerProcess(model.path, args, cpu=self.on_cpu, log_path=log, start_timeout_s=START_TIMEOUT_S, stop_grace_s=0)


def make_arms(specs: Sequence[ArmSpec], budget_bytes: int, model: BenchModel, on_cpu: bool) -> list[Arm]:
    """Every arm with the same budget. Raises PlanError for arms that cannot run here, HQConfigError for formats that may not be served.

    All of it before the first server starts: the first arm runs for minutes.
    """
    arms = [Arm(spec, budget_bytes, model.token_bytes, on_cpu) for spec in specs]
    for arm in arms:
        if on_cpu and (wrong := _only_on_gpu(arm.spec)):
            raise PlanError(f"Arm {arm.name}: {wrong} needs a GPU: leave the arm out with --arms, or run this plan where there is one")
        if arm.slots < PAGE_TOKENS:
            raise PlanError(f"Arm {arm.name}: {budget_bytes:,} bytes hold not even two pages: raise kv_gib or kv_tokens")
        if arm.spec.hicache_gib is not None and not arm.hicache_gb:
            raise PlanError(f"Arm {arm.name}: SGLang takes whole GB of host memory: give hicache_gib at least 1")
        if arm.spec.format is not None:
            spec = arm.spec
            config = HQConfig(spec.format, spec.hq_pack, spec.hq_packed_fraction, allow_ungated=spec.allow_ungated)
            admission.require(config, admission.gate_state(config, model.path, load_format="dummy" if model.dummy else "auto"))
    return arms


def _only_on_gpu(spec: ArmSpec) -> str | None:
    if spec.kv_cache_dtype != "auto":
        return f"kv_cache_dtype {spec.kv_cache_dtype}"
    if spec.hicache_gib is not None:
        return "HiCache"
    return f"attention_backend {spec.attention_backend}" if spec.attention_backend else None
