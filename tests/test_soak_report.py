"""A soak's load has the share of requests given up that its report asks for, and the report finds another one."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice

import pytest
from soak import KINDS, Load, deal_kinds
from soak_report import MIB, Report, Sample, problems

SHARE = "given up by their clients, not about a fifth"


def _found(**outcome: int) -> list[str]:
    samples = [Sample(host=MIB, device=MIB, dense_full=0.9, packed_full=0.9, pages_dropped=at) for at in range(12)]
    return problems(Report(outcome=Counter(outcome), samples=samples), MIB, MIB)


@pytest.mark.parametrize("outcome", [{"read": 750, "aborted": 250}, {"read": 40, "aborted": 10}])
def test_a_share_that_is_meant_is_no_finding(outcome):
    assert _found(**outcome) == []


@pytest.mark.parametrize(
    "outcome", [{"read": 82}, {"read": 80, "aborted": 2}, {"read": 57, "aborted": 25}, {"read": 41, "aborted": 41}, {"read": 650, "aborted": 350}]
)
def test_another_share_is_found(outcome):
    assert _found(**outcome) == [SHARE]


@pytest.mark.parametrize("clients, hundreds", [(6, 1), (48, 8)])
def test_every_pack_that_is_dealt_has_all_kinds_in_another_order(clients, hundreds):
    dealt = deal_kinds(Load(clients=clients, families=4, longest=1900, new_tokens=8), random.Random(7))
    first, second = (list(islice(dealt, 99 * hundreds + 1)) for _ in range(2))
    assert Counter(first) == Counter(second) == {kind: count * hundreds for kind, count in KINDS.items()} | {"abort all": 1}
    assert first != second
