"""Is arm B the server it claims to be, and do its answers equal those of arm A? Plain data in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sgl_hq.launch.waves import Answer, Wave

VANILLA = "vanilla"


class ABError(RuntimeError):
    """The two arms cannot be compared; the message says why."""


@dataclass(frozen=True)
class Difference:
    """Answers of an arm against those of the reference arm, request by request.

    An answer differs when its text or its tokens do. A log-probability differs when the two floats are not equal (no
    tolerance; a NaN always differs), or the token beside it, or its runners-up; a missing one differs too.
    The two diffs are over the leading tokens that both answers have in common, in nats.
    """

    differing_answers: int
    differing_logprobs: int
    max_logprob_diff: float
    mean_logprob_diff: float
    equal_answers: float  # share, 0..1
    unequal_waves: int  # waves in which the scheduler built other batches than in the reference arm
    unequal_cached: int  # requests with another number of cached prompt tokens


def plugin_block(arm: str, server_info: dict[str, Any], pack: str) -> dict[str, Any] | None:
    """The `hq` block of /server_info, after checking that the plugin is active in an HQ arm and absent in a vanilla one.

    Raises ABError otherwise, so that an arm is never compared with itself under another name.
    """
    hq = server_info["internal_states"][0].get("hq")
    if arm == VANILLA:
        if hq is not None:
            raise ABError("The vanilla arm runs with our plugin active (is SGLANG_HQ_FORMAT set?): there is nothing to compare")
        return None
    if hq is None:
        raise ABError(f"The {arm} arm runs without our plugin (see `sgl-hq doctor`): vanilla would be compared with itself")
    for key, wanted in {"active": True, "format": arm, "pack": pack}.items():
        if hq.get(key) != wanted:
            raise ABError(f"The {arm} arm's server reports {key}={hq.get(key)!r}, expected {wanted!r}")
    return hq


def compare(reference: Sequence[Wave], other: Sequence[Wave]) -> Difference:
    """Compare one phase of two arms; raises ABError when they did not answer the same requests in the same order."""
    if [_requests(w) for w in reference] != [_requests(w) for w in other]:
        raise ABError("The two arms did not answer the same requests in the same order")
    pairs = [(a, b) for left, right in zip(reference, other) for a, b in zip(left.answers, right.answers)]
    diffs = [abs(x - y) for a, b in pairs for x, y in _common(a, b)]
    differing = sum(1 for a, b in pairs if a.text != b.text or a.tokens != b.tokens)
    return Difference(
        differing_answers=differing,
        differing_logprobs=sum(_differing_logprobs(a, b) for a, b in pairs),
        max_logprob_diff=max(diffs, default=0.0),
        mean_logprob_diff=sum(diffs) / len(diffs) if diffs else 0.0,
        equal_answers=1 - differing / len(pairs),
        unequal_waves=sum(1 for left, right in zip(reference, other) if left.batches != right.batches),
        unequal_cached=sum(1 for a, b in pairs if a.cached_tokens != b.cached_tokens),
    )


def _requests(wave: Wave) -> list[tuple[int, int, int]]:
    return [(a.prefix, a.user, a.prompt_tokens) for a in wave.answers]


def _common(a: Answer, b: Answer) -> list[tuple[float, float]]:
    """Log-probabilities of the leading tokens that both answers share."""
    pairs = []
    for token_a, token_b, logprob_a, logprob_b in zip(a.tokens, b.tokens, a.logprobs, b.logprobs):
        if token_a != token_b:
            break
        pairs.append((logprob_a, logprob_b))
    return pairs


def _differing_logprobs(a: Answer, b: Answer) -> int:
    rows_a, rows_b = (list(zip(x.tokens, x.logprobs, x.top_logprobs)) for x in (a, b))
    # Compared value by value: inside containers Python takes a NaN object for equal to itself.
    same = sum(1 for x, y in zip(rows_a, rows_b) if _flat(x) == _flat(y) and not _has_nan(x))
    return max(len(rows_a), len(rows_b)) - same


def _flat(row: tuple) -> tuple:
    token, logprob, top = row
    return (token, logprob, *(value for entry in top for value in entry))


def _has_nan(row: tuple) -> bool:
    return any(isinstance(value, float) and value != value for value in _flat(row))
