"""Rows that must not be compared: each way planted, each refused; the mistakes of the earlier project first."""

from __future__ import annotations

from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_samples import BUDGET_TOKENS, TOKEN_BYTES, good_row, requests

from sgl_hq.launch.load_ab.figures import DEFINITIONS
from sgl_hq.launch.load_ab.refusals import Incomparable, check_budget, check_comparable
from sgl_hq.launch.load_ab.run_row import Drive, failed_row


def rows(repeats: int = 2, **changed):
    return [good_row(arm, repeat, **changed) for arm in ("vanilla", "hq4") for repeat in range(repeats)]


def refused(rows, match: str) -> None:
    with pytest.raises(Incomparable, match=match) as caught:
        check_comparable(rows)
    assert str(caught.value).count(": ") >= 1, "reason and remedy"


def test_good_rows_are_compared():
    check_comparable(rows())
    check_comparable(rows() + [good_row(arm, phase="cold", requests_sha256="other") for arm in ("vanilla", "hq4")])
    check_comparable([])


# --- the original mistakes --------------------------------------------------------------------------------------------


def test_one_arms_allocated_bytes_over_the_others_used_bytes():
    """Vanilla's row states its allocated bytes as what it uses: the labels part, whatever the values."""
    planted = rows()
    allocated = planted[0]["figures"]["kv_bytes_allocated"]
    for row in planted[:2]:
        row["figures"]["kv_bytes_used_peak"] = deepcopy(allocated)
    refused(planted, "differ in the quantity of kv_bytes_used_peak")
    relabelled = rows()
    relabelled[0]["figures"]["kv_bytes_used_peak"]["source"] = allocated["source"]
    refused(relabelled, "differ in the source of kv_bytes_used_peak")


def test_a_length_that_does_not_follow_the_label():
    planted = rows()
    planted[3]["per_request"]["prompt_tokens"] = [512, 512, 511, 513]  # the sum is right
    refused(planted, "hq4, shared-2.6, warm, repeat 1 is labelled 512 tokens, a prompt of it has 511")
    refused([good_row(context=32_000), good_row("hq4", context=32_000)], "labelled 32000 tokens, a prompt of it has 512")


def test_chats_are_labelled_by_their_last_turn():
    def chat(arm: str, lengths: list[int], context: int):
        row = good_row(arm, kind="multiturn", context=context)
        row["per_request"]["prompt_tokens"] = lengths
        return row

    growing = [256, 512, 512, 768]
    check_comparable([chat("vanilla", growing, 768), chat("hq4", growing, 768)])
    refused([chat("vanilla", growing, 4096), chat("hq4", growing, 4096)], "its longest prompt has 768")


def test_one_request_at_a_time():
    alone = rows()
    for row in alone:
        row["load"]["concurrency"] = 1
    refused(alone, "concurrency 1: measure with at least 2")


def test_different_requests():
    planted = rows()
    planted[1]["requests_sha256"] = "cd34"
    refused(planted, "their request files: send the same file")


# --- any single change ------------------------------------------------------------------------------------------------

LABELS = [("figures", name, key) for name in DEFINITIONS for key in ("quantity", "source", "unit", "card")]
LOADS = [("load", key) for key in ("requests", "rate", "context", "prompt_tokens", "output_tokens", "ideal_cached_tokens", "stops")]


@pytest.mark.parametrize("path", [*LABELS, *LOADS, ("load", "concurrency"), ("requests_sha256",)], ids=".".join)
@settings(max_examples=8)
@given(which=st.integers(0, 3), number=st.integers(2, 9999))
def test_any_single_changed_field_is_refused(path, which, number):
    planted = rows()
    *parents, last = path
    holder = planted[which]
    for key in parents:
        holder = holder[key]
    holder[last] = f"{holder[last]} {number}" if isinstance(holder[last], str) else (holder[last] or 0) + number
    with pytest.raises(Incomparable):
        check_comparable(planted)


@given(st.sampled_from(list(DEFINITIONS)), st.integers(0, 3))
def test_a_figure_that_one_arm_lacks_is_refused(name, which):
    planted = rows()
    del planted[which]["figures"][name]
    with pytest.raises(Incomparable):
        check_comparable(planted)


@pytest.mark.parametrize("missing", ["reuse_factor", "packed_fraction", "kv_bytes_used_peak", "kv_bytes_allocated"])
def test_memory_without_what_explains_it(missing):
    for planted in (rows(), rows()):
        for row in planted:
            row["figures"][missing]["value"] = None
        refused(planted, f"memory figures without {missing}")
    for row in planted:
        del row["figures"][missing]
    refused(planted, f"memory figures without {missing}")


def test_rows_without_memory_need_no_reuse_factor():
    planted = rows()
    for row in planted:
        row["figures"] = {name: f for name, f in row["figures"].items() if f["card"] == "latency"}
    check_comparable(planted)


def test_more_in_use_than_allocated():
    planted = rows()
    planted[2]["figures"]["kv_bytes_used_peak"]["value"] = BUDGET_TOKENS * TOKEN_BYTES + 1
    refused(planted, "4,096,001 KV bytes in use of 4,096,000 allocated")


def test_repeats():
    refused(rows()[:-1], r"hq4 has the repeats \[0\], vanilla \[0, 1\]")
    refused([*rows(), good_row("hq4", 1)], r"hq4 has the repeats \[0, 1, 1\]")
    seeds = [good_row(arm, repeat, requests_sha256=f"seed {repeat}") for arm in ("vanilla", "hq4") for repeat in (0, 1)]
    check_comparable(seeds)  # each repeat has its own file, the same in all arms
    refused([seeds[0], seeds[1], seeds[3] | {"repeat": 0}, seeds[2] | {"repeat": 1}], "their request files")


def test_answers_that_stop_may_differ_in_length():
    free = rows(stops=True)
    free[0]["load"]["output_tokens"] -= 1
    check_comparable(free)
    fixed = rows()
    fixed[0]["load"]["output_tokens"] -= 1
    refused(fixed, r"output_tokens \(35 and 36\)")


def test_unanswered_requests():
    planted = rows()
    planted[0]["per_request"]["prompt_tokens"].pop()
    refused(planted, "has 3 answers to 4 requests")
    planted = rows()
    planted[0]["load"]["prompt_tokens"] += 1
    refused(planted, "states 2049 prompt tokens, its requests have 2048")


def test_failed_rows_are_carried_along():
    failed = [failed_row("fp8", requests(), Drive(4, None, repeat), "The server ended.") for repeat in (0, 1)]
    check_comparable([*failed, *rows()])
    check_comparable(failed)
    check_comparable([good_row("vanilla", 0), good_row("vanilla", 1), good_row("hq4", 0), failed[1] | {"arm": "hq4"}])
    refused([good_row("vanilla", 0), good_row("vanilla", 1), good_row("hq4", 0), failed[1]], "hq4 has the repeats")


# --- equal bytes ------------------------------------------------------------------------------------------------------


def test_budget():
    budget = 1_000_000
    assert check_budget(budget, {"vanilla": 1_000_000, "hq4": 1_009_999, "fp8": 950_001}) == []
    with pytest.raises(Incomparable, match="hq4 holds 1,010,001 bytes for KV, the budget of every arm is 1,000,000"):
        check_budget(budget, {"vanilla": 1_000_000, "hq4": 1_010_001})
    assert check_budget(budget, {"vanilla": 1_000_000, "hq4": 900_000}) == [
        "Arm hq4 holds 900,000 bytes for KV, 10% less than the budget of 1,000,000."
    ]
