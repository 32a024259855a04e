"""From measured phases to JSON rows, one table and one honest paragraph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from sgl_hq import json_file
from sgl_hq.config import EXACT
from sgl_hq.launch.ab_compare import VANILLA, Difference
from sgl_hq.launch.kv_accounts import KvAccounts, Peak
from sgl_hq.launch.waves import Wave

Row = dict[str, Any]


@dataclass(frozen=True)
class Phase:
    """One phase of one arm. `kv` is read when the phase has ended, `peak` while it ran."""

    arm: str
    name: str  # "cold" or "warm"
    waves: tuple[Wave, ...]
    kv: KvAccounts
    peak: Peak
    hq: dict[str, Any] | None


def row(phase: Phase, difference: Difference, concurrency: int, token_bytes: int) -> Row:
    """The figures of one arm and phase. Bytes, tokens, milliseconds; `difference` is against the first vanilla arm."""
    answers = [answer for wave in phase.waves for answer in wave.answers]
    prompt_tokens = sum(a.prompt_tokens for a in answers)
    output_tokens = sum(a.completion_tokens for a in answers)
    gaps = [(a.last_token_s - a.first_token_s) / (a.completion_tokens - 1) for a in answers if a.completion_tokens > 1]
    kv, hq = phase.kv, phase.hq
    # What the scheduler attended to is what it was asked for; what it stored is what is resident when the phase has ended.
    reuse = (prompt_tokens + output_tokens) / kv.resident_tokens if kv.resident_tokens else None
    # While requests run they hold dense pages of their own, in every arm: at the peak p is lower and more bytes are used.
    peak = max(phase.peak, Peak(kv.bytes_used, kv.dense_tokens, kv.packed_tokens))
    peak_tokens = peak.dense_tokens + peak.packed_tokens
    return {
        "arm": phase.arm,
        "format": hq["format"] if hq else None,
        "phase": phase.name,
        "concurrency": concurrency,
        "requests": len(answers),
        "prompt_tokens": prompt_tokens,
        "cached_tokens": sum(a.cached_tokens for a in answers),
        "output_tokens": output_tokens,
        "reuse_factor": reuse,
        "packed_fraction": kv.packed_fraction,
        "packed_fraction_at_peak": peak.packed_tokens / peak_tokens if peak_tokens else 0.0,
        "dense_tokens": kv.dense_tokens,
        "dense_tokens_at_peak": peak.dense_tokens,
        "packed_tokens": kv.packed_tokens,
        "kv_bytes_used": kv.bytes_used,
        "kv_bytes_used_peak": peak.bytes_used,
        "kv_bytes_allocated": kv.bytes_allocated,
        "metadata_bytes": hq["metadata_bytes"] if hq else 0,
        "stored_bytes_per_shared_token": kv.packed_bytes_used / kv.packed_tokens if kv.packed_tokens else None,
        "stated_bytes_per_shared_token": hq["stored_bits_per_value"] / 16 * token_bytes if kv.packed_tokens else None,
        "bf16_bytes_per_token": token_bytes,
        "ttft_ms_p50": 1e3 * float(np.median([a.first_token_s for a in answers])),
        "tpot_ms_p50": 1e3 * float(np.median(gaps)) if gaps else None,
        "output_tokens_per_s": output_tokens / sum(wave.duration_s for wave in phase.waves),
        "differing_answers": difference.differing_answers,
        "differing_logprobs": difference.differing_logprobs,
        "max_logprob_diff": difference.max_logprob_diff,
        "mean_logprob_diff": difference.mean_logprob_diff,
        "equal_answers": difference.equal_answers,
        "unequal_waves": difference.unequal_waves,
        "unequal_cached": difference.unequal_cached,
        "plugin_active": bool(hq and hq["active"]),
        "gate": hq["gate"]["verdict"] if hq else None,
        "first_answer": answers[0].text,
    }


def table(rows: Sequence[Row]) -> Table:
    """One column for each arm and phase; memory, latency and answers as separate blocks."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title="The same chats on each server", title_justify="left")
    out.add_column("")
    for r in rows:
        out.add_column(f"{r['arm']}\n{r['phase']}", justify="right", no_wrap=True)
    for block, lines in _BLOCKS:
        out.add_row(f"[bold]{block}[/bold]")
        for label, show in lines:
            out.add_row(f"  {label}", *(show(r) for r in rows))
        out.add_section()
    return out


def paragraph(rows: Sequence[Row]) -> str:
    """What the arms share, and where each one loses against the first vanilla arm."""
    sentences = [
        "All arms: same machine, model, CPU platform, page size 64, KV byte budget and requests in equal waves.",
        "Tokens and bytes are the servers' own counters, read when a phase has ended and, for the peak, while it ran; "
        "allocated KV is taken at the start.",
    ]
    if any(r["arm"] == EXACT for r in rows):
        sentences.append(
            "exact runs vanilla's code on vanilla's batches: what their times differ by is the noise of this machine, "
            "and no other difference below it means anything."
        )
    base = {r["phase"]: r for r in reversed(rows) if r["arm"] == VANILLA}
    for r in rows:
        ref = base[r["phase"]]
        if r["phase"] != "warm" or r is ref:
            continue
        parts = [_versus("KV bytes used", r["kv_bytes_used"], ref["kv_bytes_used"])]
        parts += [_versus("time to first token", r["ttft_ms_p50"], ref["ttft_ms_p50"])]
        parts += [_versus("output tokens/s", r["output_tokens_per_s"], ref["output_tokens_per_s"])]
        sentences.append(f"{r['arm']} against vanilla, warm: {', '.join(parts)}.")
        if r["packed_tokens"]:
            sentences.append(
                f"{r['equal_answers']:.0%} of its answers are word for word vanilla's; up to the first other word its "
                f"log-probabilities are off by {r['mean_logprob_diff']:.3f} nats on average. The first answer: vanilla "
                f"{ref['first_answer']!r}, {r['arm']} {r['first_answer']!r}."
            )
    if any(r["unequal_waves"] for r in rows):
        sentences.append(f"Waves batched differently than in vanilla: {sum(r['unequal_waves'] for r in rows)}.")
    return " ".join(sentences)


def write_json(rows: Sequence[Row], facts: dict[str, Any], configuration: dict[str, Any], path: Path) -> None:
    """All rows, each with the facts and the configuration, as one JSON list; the file appears whole or not at all."""
    whole = [{**r, **facts, "configuration": configuration} for r in rows]
    json_file.write_json(whole, path)


def _versus(what: str, value: float, reference: float) -> str:
    return f"{what} {value / reference:.2f}x" if reference else what


def _number(key: str, digits: int = 0) -> Callable[[Row], str]:
    return lambda r: "-" if r[key] is None else f"{r[key]:,.{digits}f}"


def _megabytes(key: str) -> Callable[[Row], str]:
    return lambda r: f"{r[key] / 1e6:,.1f}"


_BLOCKS: tuple[tuple[str, tuple[tuple[str, Callable[[Row], str]], ...]], ...] = (
    (
        "Load",
        (
            ("requests", _number("requests")),
            ("prompt tokens", _number("prompt_tokens")),
            ("cached tokens", _number("cached_tokens")),
        ),
    ),
    (
        "Memory",
        (
            ("tokens attended / stored", _number("reuse_factor", 1)),
            ("packed fraction p", _number("packed_fraction", 2)),
            ("  at the peak", _number("packed_fraction_at_peak", 2)),
            ("KV used, MB", _megabytes("kv_bytes_used")),
            ("  at the peak", _megabytes("kv_bytes_used_peak")),
            ("KV allocated, MB", _megabytes("kv_bytes_allocated")),
            ("stored B/shared token", _number("stored_bytes_per_shared_token")),
            ("  the format states", _number("stated_bytes_per_shared_token")),
        ),
    ),
    (
        "Latency",
        (
            ("first token p50, ms", _number("ttft_ms_p50")),
            ("per token p50, ms", _number("tpot_ms_p50", 1)),
            ("output tokens/s", _number("output_tokens_per_s", 1)),
        ),
    ),
    (
        "Answers, against vanilla",
        (
            ("differing answers", _number("differing_answers")),
            ("differing logprobs", _number("differing_logprobs")),
            ("largest difference", _number("max_logprob_diff", 4)),
            ("plugin active", lambda r: "yes" if r["plugin_active"] else "no"),
            ("quality gate", lambda r: r["gate"] or "-"),
        ),
    ),
)
