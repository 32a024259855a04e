"""Rows that may not be compared are refused here, by the harness and not by its reader.

What made a "50x" before: one arm's allocated bytes over the other's used bytes, at a request length that the label did not
state, one request at a time. Each of these ends in `Incomparable`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

Row = dict[str, Any]
OVER_BUDGET = 0.01  # of the budget: the page that takes the writes of padding, and rounding to whole pages
UNDER_BUDGET = 0.05
NEEDED_WITH_MEMORY = ("reuse_factor", "packed_fraction", "kv_bytes_used_peak", "kv_bytes_allocated")
# Chats grow from turn to turn; their label is the length of the last one. Elsewhere it is the length of every prompt.
GROWING_PROMPTS = ("multiturn",)
SAME_IN_ALL_ROWS = ("requests", "concurrency", "rate", "context", "stops")
SAME_IN_A_REPEAT = ("prompt_tokens", "ideal_cached_tokens")


class Incomparable(RuntimeError):
    """Rows, or a server's counter, on which no comparison may be built; the message has the reason and what to do."""


def check_comparable(rows: Sequence[Row]) -> None:
    """Raises Incomparable unless all rows that are compared measure the same quantities on the same requests.

    rows: run rows (`run_row.py`) of any number of arms, workloads, phases and repeats. Where one repeat failed, the arm is
    shown as failed in this workload and phase, and none of its repeats is compared: those left may be the ones that went well.
    """
    failed = {_case(row) for row in rows if row["failure"] is not None}
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if _case(row) not in failed:
            check_row(row)
            groups.setdefault((row["workload"], row["phase"]), []).append(row)
    for group in groups.values():
        _check_repeats(group)
        for left, right in combinations(group, 2):
            for what, remedy in _differences(left, right):
                raise Incomparable(f"{_name(left)} and {_name(right)} differ in {what}: {remedy}")


def check_row(row: Row) -> None:
    """What one row must hold by itself, whatever it is compared with; raises Incomparable."""
    load, lengths = row["load"], row["per_request"]["prompt_tokens"]
    if load["concurrency"] < 2:
        raise _wrong(row, f"was measured at concurrency {load['concurrency']}", "measure with at least 2 requests at a time")
    if len(lengths) != load["requests"]:
        raise _wrong(row, f"has {len(lengths)} answers to {load['requests']} requests", "mark it as failed or measure it again")
    if sum(lengths) != load["prompt_tokens"]:
        raise _wrong(row, f"states {load['prompt_tokens']} prompt tokens, its requests have {sum(lengths)}", "measure it again")
    if load["context"] is not None and lengths:
        _check_label(row, load["context"], lengths)
    _check_memory(row)


def check_budget(budget_bytes: int, allocated_bytes: Mapping[str, int]) -> list[str]:
    """Sentences about arms that hold notably less than the budget; raises Incomparable when an arm holds more.

    allocated_bytes: of each arm, as its server states them, workspaces included.
    """
    for arm, held in allocated_bytes.items():
        if held > budget_bytes * (1 + OVER_BUDGET):
            raise Incomparable(
                f"Arm {arm} holds {held:,} bytes for KV, the budget of every arm is {budget_bytes:,}: give it fewer tokens"
            )
    return [
        f"Arm {arm} holds {held:,} bytes for KV, {1 - held / budget_bytes:.0%} less than the budget of {budget_bytes:,}."
        for arm, held in allocated_bytes.items()
        if held < budget_bytes * (1 - UNDER_BUDGET)
    ]


def _check_label(row: Row, context: int, lengths: Sequence[int]) -> None:
    longest_only = row["kind"] in GROWING_PROMPTS
    wrong = [max(lengths)] if longest_only else lengths
    for length in wrong:
        if length != context:
            which = "its longest prompt" if longest_only else "a prompt of it"
            raise _wrong(row, f"is labelled {context} tokens, {which} has {length}", "make the label the length of the requests")


def _check_memory(row: Row) -> None:
    figures = row["figures"]
    if not any(f["card"] == "memory" for f in figures.values()):
        return
    for name in NEEDED_WITH_MEMORY:
        if figures.get(name, {}).get("value") is None:
            raise _wrong(row, f"has memory figures without {name}", "measure it again: memory alone says nothing")
    used, allocated = (figures[name]["value"] for name in ("kv_bytes_used_peak", "kv_bytes_allocated"))
    if used > allocated:
        raise _wrong(row, f"has {used:,} KV bytes in use of {allocated:,} allocated", "one of the two is another quantity: mend it")


def _check_repeats(group: Sequence[Row]) -> None:
    """Every arm has the same repeats, each once."""
    of_arm: dict[str, list[int]] = {}
    for row in group:
        of_arm.setdefault(row["arm"], []).append(row["repeat"])
    first, expected = next(iter(of_arm.items()))
    for arm, repeats in of_arm.items():
        if len(set(repeats)) < len(repeats) or set(repeats) != set(expected):
            where = f"{group[0]['workload']}, {group[0]['phase']}"
            raise Incomparable(
                f"{where}: {arm} has the repeats {sorted(repeats)}, {first} {sorted(expected)}: measure the missing ones, each once"
            )


def _differences(left: Row, right: Row) -> Iterator[tuple[str, str]]:
    """(what differs, remedy) of two rows of one workload and phase."""
    same_plan = "measure both with one plan"
    keys = [*SAME_IN_ALL_ROWS, *(SAME_IN_A_REPEAT if left["repeat"] == right["repeat"] else ())]
    # Where nothing stops an answer early, all arms generate what the request file asks for.
    keys += ["output_tokens"] if left["repeat"] == right["repeat"] and not left["load"]["stops"] else []
    for key in keys:
        if left["load"][key] != right["load"][key]:
            yield f"{key} ({left['load'][key]} and {right['load'][key]})", same_plan
    if left["repeat"] == right["repeat"] and left["requests_sha256"] != right["requests_sha256"]:
        yield "their request files", "send the same file to both"
    if set(left["figures"]) != set(right["figures"]):
        yield f"which figures they have ({', '.join(sorted(set(left['figures']) ^ set(right['figures'])))})", same_plan
        return
    for name, figure in left["figures"].items():
        for key in ("quantity", "source", "unit", "card"):
            if figure[key] != right["figures"][name][key]:
                yield f"the {key} of {name} ({figure[key]!r} and {right['figures'][name][key]!r})", "measure the same quantity in both"


def _case(row: Row) -> tuple[str, str, str]:
    return row["arm"], row["workload"], row["phase"]


def _wrong(row: Row, what: str, remedy: str) -> Incomparable:
    return Incomparable(f"{_name(row)} {what}: {remedy}")


def _name(row: Row) -> str:
    return f"Row {row['arm']}, {row['workload']}, {row['phase']}, repeat {row['repeat']}"
