"""Equal KV bytes: one budget for every arm, checked against what each server says it has allocated, and told in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sgl_hq.launch.ab_compare import VANILLA, plugin_block
from sgl_hq.launch.bench_model import BenchModel
from sgl_hq.launch.load_ab.arms import Arm
from sgl_hq.launch.load_ab.plan import Plan
from sgl_hq.launch.load_ab.refusals import check_budget
from sgl_hq.launch.load_ab.sampler import read_moment
from sgl_hq.launch.pool_check import check_backend, check_pool
from sgl_hq.launch.server_process import ServerProcess


@dataclass(frozen=True)
class Held:
    """What the server of an arm took from the machine. Bytes; host_bytes: HiCache, beside the budget of the device."""

    allocated_bytes: int
    host_bytes: int
    args: tuple[str, ...]

    def as_row(self) -> dict[str, Any]:
        return asdict(self) | {"args": list(self.args)}


def budget_bytes(plan: Plan, model: BenchModel) -> int:
    return plan.kv_tokens * model.token_bytes if plan.kv_tokens else int(plan.kv_gib * 2**30)


def budget_tokens(plan: Plan, model: BenchModel) -> int:
    """The same in bfloat16 tokens, of which a working set is a multiple."""
    return budget_bytes(plan, model) // model.token_bytes


def check_started(arm: Arm, server: ServerProcess) -> tuple[Held, dict[str, Any] | None]:
    """What the started server holds, and its `hq` block (None without our plugin).

    Raises ABError when HQ is active in an arm without a format or absent in one of ours, BenchError when backend or pool are
    not those asked for, Incomparable when the arm has more than the budget.
    """
    info = server.server_info()
    hq = plugin_block(arm.spec.format or VANILLA, info, arm.spec.hq_pack)
    if arm.backend is not None:
        check_backend(arm.name, info, arm.backend)
    samples = server.metrics()
    held = check_pool(arm.name, samples, hq, arm.slots, arm.budget_bytes, arm.spec.kv_cache_dtype)
    check_budget(arm.budget_bytes, {arm.name: held})
    host = read_moment(samples, arm.token_bytes, 0.0).host_tokens * arm.token_bytes
    return Held(held, int(host), tuple(arm.server_args())), hq


def how_equal(arms: Sequence[Arm], held: Mapping[str, Held]) -> str:
    """How the bytes were made equal, for the report. held: of the arms that started."""
    first = arms[0]
    sentences = [
        f"Every arm may take {first.budget_bytes:,} bytes of the device for KV, "
        f"{first.budget_bytes // first.bf16_token_bytes:,} tokens in bfloat16 of {first.bf16_token_bytes:,} bytes each.",
        "--max-total-tokens of an arm is that over the bytes of a token in its KV type, less the page that SGLang adds for padding; "
        "with one of our formats it stands for bytes, which both tiers and the workspaces for reading packed pages share.",
        "What a server allocated is its own statement, read after its start; an arm above the budget by more than 1 % is refused.",
    ]
    if any(arm.spec.kv_cache_dtype == "fp4_mx_block16" for arm in arms):
        sentences.append("fp4_mx_block16 unpacks a layer at a time into memory that SGLang does not count as KV.")
    for arm in arms:
        if arm.name in held and held[arm.name].host_bytes:
            sentences.append(f"{arm.name} has {held[arm.name].host_bytes:,} bytes of host memory besides, which the others have not.")
    sentences += check_budget(first.budget_bytes, {name: facts.allocated_bytes for name, facts in held.items()})
    return " ".join(sentences)
