"""`sgl-hq ceiling`: how much faster a decode step could become, before anything is built."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from rich import box
from rich.table import Table

from sgl_hq.lab.projection import VERDICT_OVERHEAD, WORTH_BUILDING, Projection, is_open, project
from sgl_hq.launch.lab_run import CLOSED, MEASURED, check_folder, model_or_demo, progress, show, write_result
from sgl_hq.page_format import STATED_PREFIX_TOKENS

if TYPE_CHECKING:
    from sgl_hq.lab.attention_share import AttentionShare

RULE = (
    f"Threshold: at an overhead of {VERDICT_OVERHEAD:.0%} of a step, worth building means at least {WORTH_BUILDING:.2f} times the speed; "
    "anything less is closed on this target."
)
_BUSY_CORES = 0.5  # with more than this taken by others, PyTorch's threads wait for each other and steps take many times as long
_GIVEN_HEAD_DIM = 128  # of formats' bits where a share is given and no model


def run(
    model: str | None,
    context: int,
    batch: int,
    steps: int,
    device: str,
    actives: Sequence[float],
    overheads: Sequence[float],
    p_attn: float | None = None,
    dummy_weights: bool = False,
    json_path: Path | None = None,
) -> int:
    """p_attn: a share taken elsewhere; no model is loaded then. dummy_weights: of `model` only the shape is used. Returns MEASURED, or
    CLOSED where even attention that takes no time would not reach the threshold. Raises LabError, GateError or DemoModelError."""
    check_folder(json_path, "--json")
    project(p_attn or 0.0, _GIVEN_HEAD_DIM, STATED_PREFIX_TOKENS, actives, overheads)  # wrong numbers are refused before minutes pass
    print(RULE, flush=True)
    began = time.monotonic()
    if p_attn is None:
        facts, head_dim = _measured(model_or_demo(model), context, batch, steps, device, dummy_weights)
        projections = project(facts["p_attn"], head_dim, context, actives, overheads, batch)
        lines = _remarks(facts)
    else:
        facts, lines = {"p_attn": p_attn}, []
        projections = project(p_attn, _GIVEN_HEAD_DIM, STATED_PREFIX_TOKENS, actives, overheads)
    show(_title(facts), _table(projections, overheads), [*lines, _sentence(facts["p_attn"], projections[0])])
    rows = [asdict(p) | {"verdict": p.verdict} for p in projections]
    write_result("ceiling", facts | {"overheads": list(overheads), "threshold": WORTH_BUILDING, "rows": rows}, began, json_path)
    return MEASURED if projections[0].verdict == "worth building" else CLOSED


def _remarks(facts: dict[str, Any]) -> list[str]:
    lines = [f"Attention read K and V at {facts['read_gb_per_s']:.1f} GB/s; if memory gives much more, a faster kernel has a smaller p_attn."]
    if facts["device"] == "cpu" and facts["busy_cores"] > _BUSY_CORES and facts["threads"] > 1:
        lines.append(
            f"Do not trust this share: other processes kept {facts['busy_cores']:.1f} cores busy before it was measured, with {facts['threads']} "
            "threads of ours. Measure on an idle machine, or with OMP_NUM_THREADS=1."
        )
    least, most = facts["p_attn_min"], facts["p_attn_max"]
    if is_open(least) != is_open(most):
        lines.append(f"Unclear: steps had shares of {least:.3f} to {most:.3f}, on both sides of the threshold. Measure on an idle machine.")
    return lines


def _measured(name: str, context: int, batch: int, steps: int, device: str, dummy_weights: bool) -> tuple[dict[str, Any], int]:
    """(facts, head_dim)."""
    from sgl_hq.lab.attention_share import WARM_UP_STEPS, measure_share
    from sgl_hq.lab.model_facts import device_facts, head_dim

    busy_cores = psutil.cpu_percent(interval=1.0) / 100 * psutil.cpu_count()
    with progress(1 + WARM_UP_STEPS + steps) as (say, advance):
        model, ids = _model_and_ids(name, context + 1, device, dummy_weights)
        say("prefill and decode steps")
        share = measure_share(model, ids, batch, steps, lambda: advance(1))
    facts = {"model": Path(name).name, "dummy_weights": dummy_weights, "busy_cores": round(busy_cores, 2)} | device_facts(model.device)
    return facts | _shares(share) | asdict(share), head_dim(model)


def _model_and_ids(name: str, tokens: int, device: str, dummy_weights: bool) -> tuple[Any, list[int]]:
    """A model in bfloat16, and so many token ids."""
    import torch

    from sgl_hq.gate.run import load_model
    from sgl_hq.lab.dummy_weights import model_with_dummy_weights, random_ids
    from sgl_hq.lab.model_facts import check_context
    from sgl_hq.lab.texts import lab_texts

    if dummy_weights:
        model = model_with_dummy_weights(name, device)
        check_context(model, tokens)
        return model, random_ids(model, tokens)
    loaded = load_model(name, device)
    check_context(loaded.model, tokens)
    return loaded.model.to(torch.bfloat16), lab_texts()[0].token_ids(loaded.tokenizer, tokens)


def _shares(share: AttentionShare) -> dict[str, float]:
    spread = {"p_attn": share.p_attn, "p_attn_min": min(share.shares), "p_attn_max": max(share.shares)}
    return spread | {"read_gb_per_s": share.read_gb_per_s}


def _title(facts: dict[str, Any]) -> str:
    where = f"{facts['model']}, {facts['context_tokens']:,} tokens x {facts['batch']} on {facts['device']}" if "model" in facts else "given share"
    return f"Speed of a decode step, p_attn {facts['p_attn']:.3f} ({where})"


def _table(projections: Sequence[Projection], overheads: Sequence[float]) -> Table:
    out = Table(box=box.SIMPLE_HEAD)
    out.add_column("attention does")
    out.add_column("f", justify="right")
    for overhead in overheads:
        out.add_column(f"h = {overhead:g}", justify="right")
    out.add_column(f"at {VERDICT_OVERHEAD:.0%}")
    for p in projections:
        colour = "green" if p.verdict == "worth building" else "red"
        out.add_row(p.name, f"{p.active:.3f}", *(f"{s:.2f}x" for s in p.speedups), f"[{colour}]{p.verdict}[/]")
    return out


def _sentence(p_attn: float, limit: Projection) -> str:
    """What the whole table comes down to."""
    if limit.verdict == "closed":
        return (
            f"Closed: attention takes {p_attn:.1%} of a step; without any attention the step would be {limit.at_verdict:.2f} times "
            "as fast at that overhead."
        )
    return (
        f"Open: attention takes {p_attn:.1%} of a step, so no method can exceed {limit.at_verdict:.2f} times the speed at that overhead. "
        "A ceiling is no measurement of a method, and says nothing about answers: sgl-hq oracle, sgl-hq gate."
    )
