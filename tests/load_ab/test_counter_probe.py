"""The probe against servers whose counter tells the truth, lies, stands still, or lags."""

from __future__ import annotations

import pytest

from sgl_hq.launch.load_ab.counter_probe import PROBE_TOKENS, probe
from sgl_hq.launch.load_ab.refusals import Incomparable

TOKEN_BYTES, SLOTS = 1000, 4096


class Cache:
    """A server's prefix cache of whole pages; `gauge` is what it publishes, with the next batch and not on a flush."""

    def __init__(self, page_tokens: int):
        self.page_tokens, self.resident, self.gauge = page_tokens, 3000, 3000

    def send(self, tokens: int) -> None:
        self.resident += tokens // self.page_tokens * self.page_tokens
        self.gauge = self.resident

    def flush(self) -> None:
        self.resident = 0

    def used(self) -> float:
        return self.gauge * TOKEN_BYTES


def run_probe(cache: Cache, read_used, token_bytes: float = TOKEN_BYTES) -> None:
    probe(read_used, cache.send, cache.flush, token_bytes, cache.page_tokens, settle_s=0.1)


@pytest.mark.parametrize("page_tokens", [1, 16, 64])
def test_a_truthful_counter_passes(page_tokens):
    cache = Cache(page_tokens)
    run_probe(cache, cache.used)
    assert cache.gauge <= page_tokens, "the probe leaves the cache empty but for a page"


def test_a_counter_that_lags_passes():
    cache, late = Cache(64), iter([3000 * TOKEN_BYTES] * 2)
    run_probe(cache, lambda: next(late, None) or cache.used())


# The original mistake, by a counter: the bytes allocated where those in use are stated.
LIES = {
    "allocated bytes": (lambda c: SLOTS * TOKEN_BYTES, "in an empty cache"),
    "nothing at all": (lambda c: 0, "after one request"),
    "a constant": (lambda c: 10 * TOKEN_BYTES, "after one request"),
    "another width": (lambda c: 2 * c.used(), "after one request"),
    "live requests only": (lambda c: 0, "after one request"),
    "more than a page too few": (lambda c: max(0, c.used() - 65 * TOKEN_BYTES), "after one request"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_counter_is_refused(lie):
    read, when = LIES[lie]
    cache = Cache(64)
    with pytest.raises(Incomparable, match=f"{when}.*mend the counter"):
        run_probe(cache, lambda: read(cache))


def test_a_counter_that_never_falls_is_refused():
    cache, most = Cache(64), [0.0]

    def read() -> float:
        if cache.resident:
            most[0] = cache.used()
        return most[0]

    with pytest.raises(Incomparable, match="emptied again"):
        run_probe(cache, read)


def test_an_arm_in_another_kv_type_is_held_to_its_own_width():
    cache = Cache(64)
    run_probe(cache, lambda: cache.used() / 2, token_bytes=TOKEN_BYTES / 2)
    with pytest.raises(Incomparable, match=f"where {PROBE_TOKENS * TOKEN_BYTES:,} are in use"):
        run_probe(cache, lambda: cache.used() / 2)
