"""How many tokens and bytes of KV a server holds, computed the same way for every arm from the server's own counters.

The dense tier is read from two gauges of /metrics that SGLang itself keeps, `sglang:max_total_num_tokens` (slots) and
`sglang:kv_available_tokens` (free slots; updated on every prefill, on every decode step with --decode-log-interval 1, and
once when the scheduler falls idle). The packed tier is read from the `hq` block of /server_info and, while requests run, from
three gauges of the same /metrics answer; only our plugin adds them. Dense pages lent to the packed tier are not free for SGLang,
and hold nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sgl_hq.launch.prometheus_text import Sample
from sgl_hq.launch.sampling_thread import SamplingThread
from sgl_hq.launch.server_process import ServerFailed, ServerProcess
from sgl_hq.metrics.catalogue import LENT_PAGES, PACKED_BYTES, PACKED_PAGES
from sgl_hq.page_format import PAGE_TOKENS

BF16_BYTES = 2
SAMPLE_EVERY_S = 0.5  # each sample costs the HTTP process some 10 ms of one of its cores


class AccountsError(RuntimeError):
    """The server's own figures contradict each other, so no comparison may be built on them."""


@dataclass(frozen=True)
class KvAccounts:
    """What one server holds at one moment. Resident = live or cached; `packed_*` are 0 without a packed tier."""

    dense_tokens: int
    packed_tokens: int
    bytes_used: int
    bytes_allocated: int
    packed_bytes_used: int

    @property
    def resident_tokens(self) -> int:
        return self.dense_tokens + self.packed_tokens

    @property
    def packed_fraction(self) -> float:
        """Packed share of the resident tokens; 0 when nothing is resident."""
        return self.packed_tokens / self.resident_tokens if self.resident_tokens else 0.0


def bytes_per_token(config: Any) -> int:
    """KV bytes of one bf16 token of a model, all layers, K and V. `config`: a transformers text config."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * config.num_key_value_heads * head_dim * 2 * BF16_BYTES


def read_accounts(samples: Sequence[Sample], hq: dict[str, Any] | None, token_bytes: int) -> KvAccounts:
    """The accounts from one /metrics answer, the `hq` block of an idle moment (None: no plugin) and bytes per token.

    Raises AccountsError where the figures contradict each other.
    """
    slots, dense_tokens = int(gauge(samples, "sglang:max_total_num_tokens")), resident_dense_tokens(samples)
    if hq is None:
        # SGLang allocates one page more than it hands out: page 0 takes the writes of padding.
        allocated = (slots + PAGE_TOKENS) * token_bytes
        reported = gauge(samples, "sglang:kv_cache_memory_usage_gb") * 2**30
        if abs(reported - allocated) > token_bytes:
            raise AccountsError(f"The server reports {reported:.0f} bytes of KV cache, its {slots} slots make {allocated}")
        return KvAccounts(dense_tokens, 0, dense_tokens * token_bytes, allocated, 0)
    dense, packed = hq["dense"], hq["packed"]
    lent = packed["dense_pages_lent"] * PAGE_TOKENS
    books = (dense["tokens_total"], dense["tokens_total"] - dense["tokens_free"] - lent, dense["bytes_per_token"])
    if books != (slots, dense_tokens, token_bytes):
        raise AccountsError(
            f"Dense slots, resident tokens and bytes per token are {books} in /server_info "
            f"and {(slots, dense_tokens, token_bytes)} in /metrics and the model's configuration"
        )
    return KvAccounts(
        dense_tokens=dense_tokens,
        packed_tokens=packed["pages_used"] * PAGE_TOKENS,
        bytes_used=dense_tokens * token_bytes + packed["bytes_used"],
        bytes_allocated=dense["bytes_allocated"] + packed["bytes_allocated"],
        packed_bytes_used=packed["bytes_used"],
    )


def resident_dense_tokens(samples: Sequence[Sample]) -> int:
    """Dense slots that hold KV of live or cached tokens."""
    lent = sum(s.value for s in samples if s.name == LENT_PAGES) * PAGE_TOKENS  # an arm without the plugin has no such gauge
    return int(gauge(samples, "sglang:max_total_num_tokens") - gauge(samples, "sglang:kv_available_tokens") - lent)


def gauge(samples: Sequence[Sample], name: str) -> float:
    """The value of a metric that has exactly one label set (one scheduler); raises AccountsError otherwise."""
    values = [s.value for s in samples if s.name == name]
    if len(values) != 1:
        raise AccountsError(f"/metrics has {len(values)} values of {name}, expected one")
    return values[0]


class Peak(NamedTuple):
    """The moment with the most KV bytes in use: both tiers from one /metrics answer.

    SGLang refreshes the dense gauge with the next batch, ours changes at once: just after packing, a page can be counted
    in both tiers, never in none.
    """

    bytes_used: int
    dense_tokens: int
    packed_tokens: int


def read_peak(samples: Sequence[Sample], token_bytes: float) -> Peak:
    """What is resident at this moment; an arm without the plugin has no packed gauges."""
    packed = {s.name: int(s.value) for s in samples if s.name in (PACKED_PAGES, PACKED_BYTES)}
    dense_tokens = resident_dense_tokens(samples)
    return Peak(
        bytes_used=dense_tokens * token_bytes + packed.get(PACKED_BYTES, 0),
        dense_tokens=dense_tokens,
        packed_tokens=packed.get(PACKED_PAGES, 0) * PAGE_TOKENS,
    )


class PeakSampler(SamplingThread):
    """Reads what is resident in the background while a phase runs; `peak` is the sample with the most bytes."""

    def __init__(self, server: ServerProcess, token_bytes: int):
        super().__init__(SAMPLE_EVERY_S, (ServerFailed,))  # the wave in flight fails too and reports why
        self._server, self._token_bytes = server, token_bytes
        self.peak = Peak(0, 0, 0)

    def take(self) -> None:
        self.peak = max(self.peak, read_peak(self._server.metrics(), self._token_bytes))
