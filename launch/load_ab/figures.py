"""What every figure of a run row is, in one table, and the only way to make one.

A figure is a number read in a stated way. `Amount` carries both, from the function that read it; `Figure` takes the amount
only if the table says that this figure is read that way. So allocated bytes cannot stand under a name for used bytes: the
mistake that once made a "50x" out of one arm's allocated over the other's used bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

Card = Literal["memory", "latency", "cache", "answers"]


class WrongReading(RuntimeError):
    """A number was about to be reported under the name of another quantity."""


class Reading(Enum):
    """Where a number comes from; the sentences are the same for all arms, so each names every server's counter."""

    ALLOCATED = (
        "set aside when the server started: sglang:kv_cache_memory_usage_gb of /metrics, or with our plugin both tiers and "
        "the buffers that reading packed pages needs, from /server_info"
    )
    USED = (
        "sampled from /metrics: (sglang:max_total_num_tokens - sglang:kv_available_tokens - 64 x sglang:hq_dense_pages_lent) x bytes of a dense token, "
        "plus sglang:hq_packed_bytes_used"
    )
    RESIDENT = (
        "sampled from /metrics: sglang:max_total_num_tokens - sglang:kv_available_tokens - 64 x sglang:hq_dense_pages_lent, plus "
        "64 x sglang:hq_packed_pages_used"
    )
    PACKED = "sampled from /metrics: 64 x sglang:hq_packed_pages_used; 0 where there is no packed tier"
    RUNNING = "sampled from /metrics: sglang:num_running_reqs"
    HOST = "/metrics: sglang:hicache_host_total_tokens x bytes of a dense token; 0 where there is no host tier"
    WIDTH = "stored bits per value of the packed format, and of the dense KV type"
    LIMIT = "tried: the server answers a request of so many tokens and refuses one token more"
    LOGICAL = "prompt and output tokens that the server states with each answer"
    PROMPT = "prompt tokens that the server states with each answer"
    CACHED = "cached prompt tokens that the server states with each answer"
    IDEAL = "the request file: what a cache without limit and with pages of 64 tokens would find"
    EVICTED = (
        "/metrics: sglang:evicted_tokens_total; with our plugin less what was packed in place of being evicted, "
        "plus what the packed tier dropped (hq block of /server_info)"
    )
    RETRACTED = "/metrics: sglang:num_retracted_requests_total"
    FIRST_TOKEN = "client's clock, from sending a request to its first token"
    NEXT_TOKENS = "client's clock, from the first to the last token of an answer, by the tokens after the first"
    WHOLE_ANSWER = "client's clock, from sending a request to its last token"
    ANSWERED = "requests that were answered"
    OUTPUT = "output tokens that the server states with each answer"
    WALL = "client's clock, from the first request's start to the last answer's end"
    SCORES = "the answers' texts, marked against the data set's results"
    ERRORS = "requests that the client saw fail"


@dataclass(frozen=True)
class Amount:
    """A number with what it was read from; a quotient has both parts' readings, numerator first. None: nothing to read."""

    value: float | None
    readings: tuple[Reading, ...]

    def per(self, other: Amount) -> Amount:
        """The quotient; None where a part is None or nothing is divided by."""
        value = None if self.value is None or not other.value else self.value / other.value
        return Amount(value, self.readings + other.readings)

    def times(self, factor: float) -> Amount:
        return Amount(None if self.value is None else self.value * factor, self.readings)


@dataclass(frozen=True)
class Definition:
    """What a figure states. `quantity` ends where `source` begins: how it is read."""

    unit: str
    card: Card
    readings: tuple[Reading, ...]
    quantity: str

    @property
    def source(self) -> str:
        return "; ".join(dict.fromkeys(reading.value for reading in self.readings))


R = Reading
_USED = "KV bytes that hold tokens of live or cached requests, all tiers of the device; a page just packed can count in both"
_RESIDENT = "distinct tokens, live or cached, whose KV is on the device"

DEFINITIONS: dict[str, Definition] = {
    "kv_bytes_allocated": Definition("bytes", "memory", (R.ALLOCATED,), "KV bytes set aside on the device, in use or not"),
    "kv_bytes_used_peak": Definition("bytes", "memory", (R.USED,), f"{_USED}: largest sample"),
    "kv_bytes_used_mean": Definition("bytes", "memory", (R.USED,), f"{_USED}: mean over time"),
    "resident_tokens_peak": Definition("tokens", "memory", (R.RESIDENT,), f"{_RESIDENT}: largest sample"),
    "resident_tokens_mean": Definition("tokens", "memory", (R.RESIDENT,), f"{_RESIDENT}: mean over time"),
    "bytes_per_resident_token": Definition(
        "bytes", "memory", (R.USED, R.RESIDENT), "KV bytes used / resident tokens, both means over time"
    ),
    "host_kv_bytes": Definition("bytes", "memory", (R.HOST,), "host memory set aside for KV, outside the KV budget of the device"),
    "packed_fraction": Definition(
        "ratio", "memory", (R.PACKED, R.RESIDENT), "p: packed tokens / resident tokens, both means over time"
    ),
    "packed_fraction_peak": Definition(
        "ratio", "memory", (R.PACKED, R.RESIDENT), "packed tokens / resident tokens in the sample with the most KV bytes used"
    ),
    "reuse_factor": Definition(
        "ratio", "memory", (R.LOGICAL, R.RESIDENT), "prompt and output tokens of all requests / largest sample of resident tokens"
    ),
    "max_context_tokens": Definition("tokens", "memory", (R.LIMIT,), "longest request, prompt and output, that the server takes"),
    "max_running": Definition("count", "memory", (R.RUNNING,), "requests running at once: largest sample"),
    "modelled_gain": Definition(
        "ratio", "memory", (R.PACKED, R.RESIDENT, R.WIDTH),
        "16 / (p b + (1 - p) d): b bits of a packed value, d of a dense one (16 in bf16), p the packed fraction",
    ),
    "measured_gain": Definition(
        "ratio", "memory", (R.RESIDENT, R.USED), "bytes of the resident tokens in bf16 / KV bytes used, both means over time"
    ),
    "logical_tokens_attended": Definition("tokens", "cache", (R.LOGICAL,), "prompt and output tokens of all requests"),
    "hit_rate": Definition("ratio", "cache", (R.CACHED, R.PROMPT), "prompt tokens found in a cache, device or host / prompt tokens"),
    "ideal_hit_rate": Definition("ratio", "cache", (R.IDEAL, R.PROMPT), "prompt tokens that a cache without limit finds / prompt tokens"),
    "evicted_tokens": Definition("tokens", "cache", (R.EVICTED,), "cached tokens that left the device's KV (to host memory or for good)"),
    "recomputed_tokens": Definition(
        "tokens", "cache", (R.IDEAL, R.CACHED), "prompt tokens that a cache without limit finds and this one did not, at least 0"
    ),
    "retractions": Definition("count", "cache", (R.RETRACTED,), "running requests put back into the queue for lack of KV"),
    **{
        f"{metric}_ms_p{q}": Definition("ms", "latency", (reading,), f"{what}: percentile {q} of the answered requests")
        for metric, reading, what in (
            ("ttft", R.FIRST_TOKEN, "time to first token"),
            ("tpot", R.NEXT_TOKENS, "time for each token after the first"),
            ("e2e", R.WHOLE_ANSWER, "time to the last token"),
        )
        for q in (50, 90, 99)
    },
    "output_tok_s": Definition("tokens/s", "latency", (R.OUTPUT, R.WALL), "output tokens / duration of the phase"),
    "requests_s": Definition("1/s", "latency", (R.ANSWERED, R.WALL), "answered requests / duration of the phase"),
    "task_score": Definition("ratio", "answers", (R.SCORES,), "share of the answers that are right"),
    "requests_failed": Definition("count", "answers", (R.ERRORS,), "requests without a complete answer"),
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One measured number. Raises WrongReading when `amount` was not read in the way that the table states for `name`."""

    name: str
    amount: Amount

    def __post_init__(self) -> None:
        if self.name not in DEFINITIONS:
            raise WrongReading(f"There is no figure {self.name!r}: define it in figures.DEFINITIONS")
        wanted, value = DEFINITIONS[self.name].readings, self.amount.value
        if self.amount.readings != wanted:
            got, need = (", ".join(r.name for r in readings) for readings in (self.amount.readings, wanted))
            raise WrongReading(f"{self.name} is made from {need}, this number from {got}: give it its own name or read the right counter")
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise WrongReading(f"{self.name} is {value}, which no counter or clock can give: look at how it was read")

    def as_row(self) -> dict[str, Any]:
        """Plain JSON values: value, unit, card, quantity, source."""
        d = DEFINITIONS[self.name]
        return {"value": self.amount.value, "unit": d.unit, "card": d.card, "quantity": d.quantity, "source": d.source}


def figure_rows(amounts: dict[str, Amount]) -> dict[str, dict[str, Any]]:
    """The `figures` of a run row, in the table's order; a figure left out of `amounts` raises WrongReading."""
    if missing := set(DEFINITIONS) - set(amounts):
        raise WrongReading(f"No amount for {', '.join(sorted(missing))}: give Amount(None, ...) where there is nothing to read")
    figures = {name: Figure(name, amount) for name, amount in amounts.items()}
    return {name: figures[name].as_row() for name in DEFINITIONS}
