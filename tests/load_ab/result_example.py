"""A result of `sgl-hq ab PLAN.yaml` with plausible figures, made from a seed: what the report is tested on.

Six arms, three workloads, two phases, three repeats; `hicache` fails, `lossless` loses to vanilla in every latency, hq4
answers fewer questions than vanilla. No figure here was measured.
"""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

import numpy as np

BUDGET_TOKENS, TOKEN_BYTES = 200_000, 57_344
BUDGET = BUDGET_TOKENS * TOKEN_BYTES
HOST_BYTES = 32 * 2**30
FAILURE = "the server ended with exit code 1 under load: <host pool & device pool> differ; see its log"
REPEATS = 3
REQUESTS = 96
# arm: speed factor, stored bits, share of problems solved
ARMS = {
    "vanilla": (1.0, 16, 0.62),
    "vanilla-fp8": (1.6, 8, 0.35),
    "hicache": (1.2, 16, 0.62),
    "lossless": (0.9, 12.125, 0.62),
    "hq6": (2.1, 6.0, 0.61),
    "hq4": (3.2, 4.25, 0.55),
}
WORKLOADS = {
    "shared-1.3": {"kind": "shared", "context": 8256, "working_set": 1.3, "output": 32},
    "shared-2.6": {"kind": "shared", "context": 8256, "working_set": 2.6, "output": 32},
    "gsm8k": {"kind": "fewshot", "context": None, "shots": 8, "output": 256},
}
_FIGURES = {  # name: unit, card, what the figure is
    "kv_bytes_allocated": ("bytes", "memory", "bytes of both KV tiers and their workspaces, taken at the start"),
    "kv_bytes_used_peak": ("bytes", "memory", "largest sample of the KV bytes that hold tokens"),
    "kv_bytes_used_mean": ("bytes", "memory", "time mean of the KV bytes that hold tokens"),
    "host_kv_bytes": ("bytes", "memory", "KV bytes in host memory, beside the budget"),
    "resident_tokens_peak": ("tokens", "memory", "largest sample of the tokens held"),
    "resident_tokens_mean": ("tokens", "memory", "time mean of the tokens held"),
    "bytes_per_resident_token": ("bytes", "memory", "time mean of the bytes used over the time mean of the tokens held"),
    "packed_fraction": ("ratio", "memory", "packed tokens over tokens held, mean over samples"),
    "packed_fraction_peak": ("ratio", "memory", "the same at the peak of the bytes used"),
    "reuse_factor": ("ratio", "memory", "prompt and output tokens of all requests over the peak of the tokens held"),
    "max_context_tokens": ("tokens", "memory", "longest request that the server takes"),
    "max_running": ("count", "memory", "most requests running at a time"),
    "modelled_gain": ("ratio", "memory", "1 / (p b / 16 + 1 - p)"),
    "measured_gain": ("ratio", "memory", "bf16 bytes of the tokens held over the bytes used"),
    "logical_tokens_attended": ("tokens", "cache", "prompt and output tokens of all requests"),
    "hit_rate": ("ratio", "cache", "cached over prompt tokens"),
    "ideal_hit_rate": ("ratio", "cache", "the same of an infinite cache"),
    "evicted_tokens": ("tokens", "cache", "tokens dropped from the cache"),
    "recomputed_tokens": ("tokens", "cache", "cached tokens of an infinite cache less the cached ones"),
    "retractions": ("count", "cache", "requests thrown back into the queue"),
    **{
        f"{key}_{quantile}": ("ms", "latency", f"{what}, {quantile} over the requests")
        for key, what in (("ttft_ms", "time to first token"), ("tpot_ms", "time per output token"), ("e2e_ms", "time to the last token"))
        for quantile in ("p50", "p90", "p99")
    },
    "output_tok_s": ("tokens/s", "latency", "output tokens over the phase's duration"),
    "requests_s": ("1/s", "latency", "requests over the phase's duration"),
    "task_score": ("ratio", "answers", "right answers over questions"),
    "requests_failed": ("count", "answers", "requests without an answer"),
}  # fmt: skip


def result_example() -> dict[str, Any]:
    """A whole result, as the JSON file holds it."""
    rng = np.random.default_rng(5)
    runs = [
        _run(rng, arm, workload, phase, repeat)
        for arm in ARMS for workload in WORKLOADS for repeat in range(REPEATS) for phase in ("cold", "warm")
    ]  # fmt: skip
    return {
        "facts": {
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "versions": {"sgl_hq": "0.3.1", "sglang": "0.5.17", "torch": "2.11.0", "python": "3.12.3"},
            "machine": {"gpu": "NVIDIA H200", "cpu": "Intel(R) Xeon(R) Processor", "cores": 16, "ram_bytes": 135_148_564_480},
            "command": "sgl-hq ab pressure-h200 --json ab.json --html ab.html",
            "date": "2026-09-01T12:00:00+00:00",
        },
        "plan": {
            "about": "An example.",
            "model": "qwen2.5-7b-dummy", "kv_tokens": BUDGET_TOKENS, "concurrency": 64, "seed": 0, "repeats": REPEATS,
            "arms": [{"name": arm, "format": arm if arm.startswith(("lossless", "hq")) else None} for arm in ARMS],
            "workloads": [{"name": name, **spec} for name, spec in WORKLOADS.items()],
        },
        "equal_bytes": {
            "budget_bytes": BUDGET,
            "how": "Every arm's KV pool, workspaces and metadata included, is sized to the budget.",
            "arms": {
                arm: {
                    "allocated_bytes": BUDGET - 1_000_000 * number,
                    "host_bytes": HOST_BYTES if arm == "hicache" else 0,
                    "args": ["--max-total-tokens", str(BUDGET_TOKENS), *(["--hq-format", arm] if bits < 16 and "fp8" not in arm else [])],
                }
                for number, (arm, (_, bits, _)) in enumerate(ARMS.items())
            },
        },
        "runs": runs,
        "summary": _summary(runs),
    }  # fmt: skip


def _run(rng: np.random.Generator, arm: str, workload: str, phase: str, repeat: int) -> dict[str, Any]:
    spec = WORKLOADS[workload]
    row = {
        "arm": arm, "workload": workload, "kind": spec["kind"], "phase": phase, "repeat": repeat, "seed": repeat,
        "requests_sha256": f"{workload}-{phase}-{repeat}", "failure": FAILURE if arm == "hicache" else None,
    }  # fmt: skip
    prompt = spec["context"] or 1000
    load = {
        "requests": REQUESTS, "concurrency": 64, "rate": None, "context": spec["context"], "prompt_tokens": REQUESTS * prompt,
        "output_tokens": REQUESTS * spec["output"], "ideal_cached_tokens": REQUESTS * prompt * 9 // 10, "duration_s": None,
    }  # fmt: skip
    if arm == "hicache":
        return row | {"load": load, "figures": {}, "per_request": {}, "series": {}}
    speed, bits, score = ARMS[arm]
    speed *= (1.2 if phase == "warm" else 1.0) / (2.0 if workload == "shared-2.6" else 1.0)
    noise = rng.normal(1, 0.03)
    ttft = rng.lognormal(np.log(300 / speed), 0.5, REQUESTS)
    tpot = rng.lognormal(np.log(12 / speed), 0.1, REQUESTS)
    e2e = ttft + tpot * spec["output"]
    duration = 12 / speed * noise
    ours = arm in ("lossless", "hq6", "hq4")
    packed = (0.75 if phase == "warm" else 0.5) if ours else 0.0
    token_bytes = TOKEN_BYTES * (packed * bits / 16 + 1 - packed) if ours else TOKEN_BYTES * bits / 16
    time = np.linspace(0, duration, 48)
    filled = min(0.97, 0.5 * load["prompt_tokens"] / BUDGET_TOKENS)
    used = BUDGET * np.minimum(filled, 1.2 * time / duration + 0.01 * rng.random(48))
    resident = used / (token_bytes * 1.02)
    hit = min(0.9, 0.3 * speed) * noise
    attended = load["prompt_tokens"] + load["output_tokens"]
    values = {
        "kv_bytes_allocated": BUDGET, "kv_bytes_used_peak": used.max(), "kv_bytes_used_mean": used.mean(), "host_kv_bytes": 0,
        "resident_tokens_peak": round(resident.max()), "resident_tokens_mean": resident.mean(),
        "bytes_per_resident_token": used.mean() / resident.mean(), "packed_fraction": packed, "packed_fraction_peak": packed * 0.9,
        "reuse_factor": attended / resident.max(), "max_context_tokens": 32_768 if not ours else 30_000, "max_running": 64,
        "modelled_gain": TOKEN_BYTES / token_bytes if ours else None, "measured_gain": TOKEN_BYTES * resident.sum() / used.sum(),
        "logical_tokens_attended": attended, "hit_rate": hit, "ideal_hit_rate": 0.9,
        "evicted_tokens": round(1e5 / speed), "recomputed_tokens": round((0.9 - min(hit, 0.9)) * load["prompt_tokens"]), "retractions": 0,
        "output_tok_s": load["output_tokens"] / duration, "requests_s": REQUESTS / duration,
        "task_score": score * noise if spec["kind"] == "fewshot" else None, "requests_failed": 0,
    }  # fmt: skip
    for key, times in (("ttft_ms", ttft), ("tpot_ms", tpot), ("e2e_ms", e2e)):
        values |= {f"{key}_p{q}": np.percentile(times, q) for q in (50, 90, 99)}
    figures = {
        name: {"value": None if values[name] is None else float(values[name]), "unit": unit, "card": card, "quantity": quantity,
               "source": "the client's clock" if card == "latency" else "/metrics"}
        for name, (unit, card, quantity) in _FIGURES.items()
    }  # fmt: skip
    per_request = {"ttft_ms": ttft.tolist(), "tpot_ms": tpot.tolist(), "e2e_ms": e2e.tolist()}
    per_request |= {"prompt_tokens": [prompt] * REQUESTS, "cached_tokens": [int(hit * prompt)] * REQUESTS, "right": []}
    series = {"t_s": time.tolist(), "kv_bytes_used": used.tolist(), "running": [64] * 48, "queued": [0] * 48}
    return row | {"load": load | {"duration_s": duration}, "figures": figures, "per_request": per_request, "series": series}


def _summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means with normal intervals in place of the harness's bootstrap."""
    rows = []
    for first in (run for run in runs if run["repeat"] == 0):
        key = [first[name] for name in ("arm", "workload", "phase")]
        same = [run for run in runs if [run[name] for name in ("arm", "workload", "phase")] == key]
        figures = {}
        for name, about in first["figures"].items():
            values = [run["figures"][name]["value"] for run in same if run["figures"][name]["value"] is not None]
            half = 1.96 * stdev(values) / len(values) ** 0.5 if values else None
            figures[name] = {
                "mean": fmean(values) if values else None,
                "low": fmean(values) - half if values else None,
                "high": fmean(values) + half if values else None,
                "n": len(values),
                **{part: about[part] for part in ("unit", "card", "quantity")},
            }
        rows.append({name: first[name] for name in ("arm", "workload", "kind", "phase", "failure", "load")} | {"figures": figures})
    return rows
