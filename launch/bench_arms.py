"""The arms of `sgl-hq bench serve`: which server, and how it is told apart from the others."""

from __future__ import annotations

from dataclasses import dataclass

from sgl_hq.config import EXACT
from sgl_hq.launch.ab_compare import VANILLA
from sgl_hq.launch.bench_facts import BenchError
from sgl_hq.page_format import PAGE_TOKENS, check_format_name, is_lossy

BACKENDS = ("flashinfer", "fa3", "triton")
FP8 = ("fp8_e4m3", "fp8_e5m2")
DEFAULT_ARMS = "vanilla,vanilla/fa3,vanilla/triton,vanilla/flashinfer/fp8_e4m3,exact,bf16,lossless,int8,hq6,hq4"
QUICK_ARMS = "vanilla,hq4"
GRAMMAR = f"vanilla[/BACKEND[/KV_DTYPE]] or FORMAT[/BACKEND], BACKEND one of {', '.join(BACKENDS)} (the first if left out)"


@dataclass(frozen=True)
class Arm:
    """format: of the packed tier, `exact`, or None for vanilla. kv_dtype: of vanilla's KV, "auto" (bfloat16) or an FP8."""

    format: str | None
    backend: str = BACKENDS[0]
    kv_dtype: str = "auto"

    @property
    def name(self) -> str:
        return "/".join([self.format or VANILLA, self.backend, *([] if self.kv_dtype == "auto" else [self.kv_dtype])])

    @property
    def is_vanilla(self) -> bool:
        return self.format is None

    @property
    def packs(self) -> bool:
        return self.format not in (None, EXACT)

    @property
    def bytes_divisor(self) -> int:
        """A bfloat16 token of KV makes room for so many tokens of this arm's dense KV."""
        return 2 if self.kv_dtype in FP8 else 1

    def server_args(self, kv_tokens: int, pack: str, packed_fraction: float | str) -> list[str]:
        """What makes this arm's server; kv_tokens: the KV byte budget of every arm, in bfloat16 tokens.

        Vanilla keeps SGLang's default page size, which is its faster one.
        """
        args = ["--attention-backend", self.backend, "--max-total-tokens", str(kv_tokens * self.bytes_divisor)]
        if self.is_vanilla:
            return [*args, "--kv-cache-dtype", self.kv_dtype]
        args += ["--page-size", str(PAGE_TOKENS), "--hq-format", self.format, "--hq-pack", pack]
        if self.packs:
            args += ["--hq-packed-fraction", str(packed_fraction)]
        # Weights of a benchmark may be dummies, which no gate can judge.
        return [*args, "--hq-allow-ungated"] if self.packs and is_lossy(self.format) else args


def parse_arms(text: str) -> list[Arm]:
    """Comma-separated arms, in order. Raises BenchError that names what is not one."""
    arms = [_parse_arm(part.strip()) for part in text.split(",") if part.strip()]
    if not arms:
        raise BenchError(f"--arms names no arm: give {GRAMMAR}")
    if len(set(arms)) < len(arms):
        raise BenchError("--arms names an arm twice")
    return arms


def _parse_arm(text: str) -> Arm:
    head, *rest = text.split("/")
    vanilla = head == VANILLA
    backend, kv_dtype, *more = [*rest, *[BACKENDS[0], "auto"][len(rest) :]]
    if backend not in BACKENDS or kv_dtype not in ("auto", *FP8) or more or (kv_dtype != "auto" and not vanilla):
        raise BenchError(f"--arms: {text!r} is no arm: give {GRAMMAR}")
    try:
        if not vanilla and head != EXACT:
            check_format_name(head)
    except ValueError as error:
        raise BenchError(f"--arms: {error}") from error
    return Arm(None if vanilla else head, backend, kv_dtype)
