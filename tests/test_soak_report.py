"""What a soak's report finds: few requests are judged with the error that chance gives them, many by the bounds alone."""

from __future__ import annotations

from collections import Counter

import pytest
from soak_report import MIB, Report, Sample, problems

SHARE = "given up by their clients, not about a fifth"


def _found(**outcome: int) -> list[str]:
    samples = [Sample(host=MIB, device=MIB, dense_full=0.9, packed_full=0.9, pages_dropped=at) for at in range(12)]
    return problems(Report(outcome=Counter(outcome), samples=samples), MIB, MIB)


@pytest.mark.parametrize("outcome", [{"read": 57, "aborted": 25}, {"read": 750, "aborted": 250}, {"read": 40, "aborted": 10}])
def test_a_share_that_is_meant_is_no_finding(outcome):
    assert _found(**outcome) == []


@pytest.mark.parametrize("outcome", [{"read": 82}, {"read": 80, "aborted": 2}, {"read": 41, "aborted": 41}, {"read": 650, "aborted": 350}])
def test_another_share_is_found(outcome):
    assert _found(**outcome) == [SHARE]
