"""The amounts behind a run row's figures: from samples, counters and answers of one phase, by the same code for every arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sgl_hq.launch.load_ab.counters import Counters
from sgl_hq.launch.load_ab.figures import Amount, Reading
from sgl_hq.launch.load_ab.sampler import Series

PERCENTILES = (50, 90, 99)
BF16_BITS = 16
Results = Sequence[dict[str, Any]]  # of the answered requests, as `run_row` takes them


@dataclass(frozen=True)
class ArmFacts:
    """What a row needs to know of its arm.

    allocated_bytes: KV of all tiers and the workspaces, as the server states them. token_bytes: of a dense token in this
    arm's KV type; bf16_token_bytes: of a token in bf16. stored_bits: of a packed value, 16 without a packed tier.
    max_context_tokens: None when it was not tried.
    """

    arm: str
    allocated_bytes: int
    token_bytes: float
    bf16_token_bytes: int
    stored_bits: float
    max_context_tokens: int | None = None


def per_request(done: Results) -> dict[str, list[float]]:
    """Lists in the file's order; an answer of one token has no time between tokens, so `tpot_ms` may be shorter."""
    several = [r for r in done if r["output_tokens"] > 1]
    return {
        "ttft_ms": [round(r["ttft_s"] * 1000, 3) for r in done],
        "tpot_ms": [round((r["latency_s"] - r["ttft_s"]) / (r["output_tokens"] - 1) * 1000, 3) for r in several],
        "e2e_ms": [round(r["latency_s"] * 1000, 3) for r in done],
        "prompt_tokens": [r["prompt_tokens"] for r in done],
        "cached_tokens": [r["cached_tokens"] for r in done],
    }


def duration_s(done: Results) -> float:
    """From the first request's start to the last answer's end."""
    return max(r["start_s"] + r["latency_s"] for r in done) - min(r["start_s"] for r in done)


def memory(arm: ArmFacts, done: Results, series: Series) -> dict[str, Amount]:
    """What is held, on which part of it, and what the packed format should save."""
    used, resident = series.used_mean(), series.resident_mean()
    packed_fraction = series.packed_mean().per(resident)
    return {
        "kv_bytes_allocated": Amount(arm.allocated_bytes, (Reading.ALLOCATED,)),
        "kv_bytes_used_peak": series.used_peak(),
        "kv_bytes_used_mean": used,
        "resident_tokens_peak": series.resident_peak(),
        "resident_tokens_mean": resident,
        "bytes_per_resident_token": used.per(resident),
        "host_kv_bytes": series.host_bytes(),
        "packed_fraction": packed_fraction,
        "packed_fraction_peak": series.packed_fraction_at_peak(),
        "reuse_factor": _logical_tokens(done).per(series.resident_peak()),
        "max_context_tokens": Amount(arm.max_context_tokens, (Reading.LIMIT,)),
        "max_running": series.running_peak(),
        "modelled_gain": modelled_gain(packed_fraction, arm),
        "measured_gain": resident.times(arm.bf16_token_bytes).per(used),
    }


def modelled_gain(packed_fraction: Amount, arm: ArmFacts) -> Amount:
    """Bytes in bf16 over bytes as stored; in an arm whose dense tier is bf16, 1 / (p b / 16 + 1 - p)."""
    readings = (*packed_fraction.readings, Reading.WIDTH)
    if packed_fraction.value is None:
        return Amount(None, readings)
    dense_bits = BF16_BITS * arm.token_bytes / arm.bf16_token_bytes
    p = packed_fraction.value
    return Amount(BF16_BITS / (p * arm.stored_bits + (1 - p) * dense_bits), readings)


def cache(requests: dict[str, Any], done: Results, counters: Counters) -> dict[str, Amount]:
    """requests: `request_facts`; counters: what passed during the phase."""
    prompt = Amount(sum(r["prompt_tokens"] for r in done), (Reading.PROMPT,))
    cached = Amount(sum(r["cached_tokens"] for r in done), (Reading.CACHED,))
    ideal = Amount(requests["ideal_cached_tokens"], (Reading.IDEAL,))
    return {
        "logical_tokens_attended": _logical_tokens(done),
        "hit_rate": cached.per(prompt),
        "ideal_hit_rate": ideal.per(prompt),
        "evicted_tokens": Amount(counters.evicted_tokens, (Reading.EVICTED,)),
        "recomputed_tokens": Amount(max(0, ideal.value - cached.value), ideal.readings + cached.readings),
        "retractions": Amount(counters.retractions, (Reading.RETRACTED,)),
    }


def latency(times_ms: dict[str, list[float]], done: Results) -> dict[str, Amount]:
    """times_ms: `per_request`."""
    readings = {"ttft": Reading.FIRST_TOKEN, "tpot": Reading.NEXT_TOKENS, "e2e": Reading.WHOLE_ANSWER}
    amounts = {}
    for metric, reading in readings.items():
        times = times_ms[f"{metric}_ms"]
        values = np.percentile(times, PERCENTILES) if times else [None] * len(PERCENTILES)
        for q, value in zip(PERCENTILES, values):
            amounts[f"{metric}_ms_p{q}"] = Amount(None if value is None else float(value), (reading,))
    wall = Amount(duration_s(done), (Reading.WALL,))
    output = Amount(sum(r["output_tokens"] for r in done), (Reading.OUTPUT,))
    return amounts | {"output_tok_s": output.per(wall), "requests_s": Amount(len(done), (Reading.ANSWERED,)).per(wall)}


def _logical_tokens(done: Results) -> Amount:
    return Amount(sum(r["prompt_tokens"] + r["output_tokens"] for r in done), (Reading.LOGICAL,))
