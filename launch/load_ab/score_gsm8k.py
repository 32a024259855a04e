"""GSM8K's score: the last number of an answer against the reference, which stands after "####"."""

from __future__ import annotations

import re
from decimal import Decimal

# 1,080 or 1080 or .5 or 12.50; a dollar sign on either side of the minus; "5-3" and "(a)-3" hold no negative number.
_NUMBER = re.compile(r"((?<![\w)])[-−])?\$?((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")


def reference(solution: str) -> str:
    """The number after "####" of a solution, without commas; raises ValueError where there is none."""
    _, mark, result = solution.rpartition("####")
    number = last_number(result) if mark else None
    if number is None:
        raise ValueError(f"no '#### number' in {solution[-40:]!r}")
    return str(number)


def score(text: str, answer: str) -> int:
    """1 when the last number of `text` equals `answer` in value (18 and $18.00 are equal), else 0."""
    return int(last_number(text) == Decimal(answer))


def last_number(text: str) -> Decimal | None:
    found = None
    for found in _NUMBER.finditer(text):
        pass
    if found is None:
        return None
    sign, digits = found.groups()
    value = Decimal(digits.replace(",", ""))
    return -value if sign else value
