"""docs/lab.md is what its command writes from the committed rows; a decision needs ceiling and oracle on the same target."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]


def test_the_committed_page_is_written_from_the_committed_rows(tmp_path):
    from sgl_hq.launch import lab_report

    docs = shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (docs / "lab.md").unlink()
    lab_report.write(docs)
    assert (docs / "lab.md").read_text() == (ROOT / "docs" / "lab.md").read_text()


@pytest.mark.parametrize(
    ("p_attn", "verdict", "context", "expected"),
    [
        (0.5, "pass", 2048, ["**worth building**"]),
        (0.1, "pass", 2048, ["closed"]),  # the answers survive, the step would hardly be faster
        (0.5, "fail", 2048, ["closed"]),
        (0.5, "pass", 4096, []),  # an oracle of another context says nothing
    ],
)
def test_decisions(p_attn, verdict, context, expected):
    from sgl_hq.launch.lab_report import _decisions

    ceiling = {"model": "m", "context_tokens": 2048, "batch": 1, "p_attn": p_attn}
    selector = {"selector": "quest:f=0.25:b=16", "read_fraction": 0.4, "implementation_verdict": verdict}
    oracle = {"model": "m", "context_tokens": context, "selectors": [selector]}
    assert [row[-1] for row in _decisions([ceiling], [oracle])] == expected
