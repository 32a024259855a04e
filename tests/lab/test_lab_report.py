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


def ceiling(p_attn: float, batch: int = 16, context: int = 2048) -> dict:
    from sgl_hq.lab.projection import project

    rows = [vars(p) for p in project(p_attn, 64, context, batch=batch)]
    return {"model": "m", "context_tokens": context, "batch": batch, "device": "cpu", "p_attn": p_attn, "rows": rows}


def selector(name: str, verdict: str, read: float = 0.4, within: int = 32) -> dict:
    figures = {"rows": 32, "rows_within_bounds": within, "read_fraction": read, "mse_max": 0.1}
    return {"selector": name, "oracle": name.startswith("global"), "implementation_verdict": verdict} | figures


def oracle(*selectors: dict) -> dict:
    return {"model": "m", "context_tokens": 2048, "device": "cpu", "selectors": list(selectors)}


@pytest.mark.parametrize(
    ("name", "p_attn", "verdict", "context", "expected"),
    [
        ("quest:f=0.25:b=16", 0.5, "pass", 2048, ["worth building"]),
        ("global_block_mass:f=0.25:b=16", 0.5, "pass", 2048, ["worth looking for"]),  # an oracle cannot be built
        ("quest:f=0.25:b=16", 0.1, "pass", 2048, ["closed"]),  # the answers survive, the step would hardly be faster
        ("quest:f=0.25:b=16", 0.5, "fail", 2048, ["closed"]),
        ("quest:f=0.25:b=16", 0.5, "pass", 4096, []),  # a ceiling of another context says nothing
    ],
)
def test_decisions(name, p_attn, verdict, context, expected):
    from sgl_hq.launch.lab_decisions import decide

    assert [d.conclusion for d in decide(oracle(selector(name, verdict)), [ceiling(p_attn, context=context)])] == expected


def test_runs_over_the_same_steps_are_joined_and_others_are_not():
    from sgl_hq.launch.lab_decisions import joined

    run = lambda name, steps, **more: oracle(selector(name, "fail")) | {"steps": steps, "texts": ["code"]} | more  # noqa: E731
    quarter, half, all_of_it = "quest:f=0.25:b=16", "quest:f=0.5:b=16", "quest:f=1:b=16"
    found = joined([run(quarter, 16), run(half, 16), run(all_of_it, 8), run(quarter, 16, gpu="H")])
    assert [[s["selector"] for s in r["selectors"]] for r in found] == [[quarter, half], [all_of_it], [quarter]]


def test_one_ceiling_that_reaches_the_threshold_is_enough():
    from sgl_hq.launch.lab_decisions import decide

    (decision,) = decide(oracle(selector("quest:f=0.25:b=16", "pass")), [ceiling(0.1), ceiling(0.5)])
    assert decision.speeds == (pytest.approx(1 / (0.9 + 0.1 * 0.4 + 0.05)), pytest.approx(1 / (0.5 + 0.5 * 0.4 + 0.05)))
    assert decision.conclusion == "worth building"


def test_conclusions_name_what_passed_and_never_more():
    from sgl_hq.launch.lab_conclusions import of_target

    block, quest, recent = "global_block_mass:f=0.25:b=64", "quest:f=0.25:b=16", "recent_sink:sink=4:recent=64"
    failing = [selector(quest, "fail", within=31), selector(recent, "fail", within=3)]
    said = of_target(oracle(selector(block, "pass"), *failing), [ceiling(0.5), ceiling(0.2, batch=1)])
    assert "50% of a step on cpu, batch 16 (at most 1.82 times the speed), 20% of a step on cpu, batch 1 (at most 1.18" in said
    assert "Grouping, 16 sharers on cpu, batch 16: at most 1.72 times" in said and said.count("Grouping") == 1
    assert f"Every bound at every step is kept by 1 of 1 oracles: `{block}` (worst logit MSE 0.100)." in said
    assert f"No selector that can be built keeps every bound; the nearest is `{quest}`, 31 of 32 steps." in said
    assert "Worth looking for" in said and "Worth building" not in said

    said = of_target(oracle(selector(block, "pass"), selector(quest, "pass", read=0.3)), [ceiling(0.5)])
    assert f"Worth building: `{quest}` (at most {1 / 0.7:.2f} times the speed)." in said and "Worth looking for" not in said
    said = of_target(oracle(*failing), [ceiling(0.5)])
    assert said.endswith("Closed.") and "oracle" not in said
    assert of_target(oracle(selector(quest, "pass")), [ceiling(0.1)]).endswith("would reach 1.01 times the speed at most.")
    assert "No ceiling is measured" in of_target(oracle(selector(quest, "pass")), [])


def test_a_cosine_that_misleads_is_shown_with_the_worst_pair():
    from sgl_hq.launch.lab_conclusions import of_frontier

    rows = [
        {"format": n, "stored_bits": bits, "strict_trials": ok, "trials": 5, "mse_mean": mse, "score_cos_mean": score, "output_cos_mean": out}
        for n, bits, ok, mse, score, out in (
            ("a", 2, 0, None, 0.5, 0.5), ("b", 4, 4, 0.6, 0.99, 0.97), ("c", 5, 5, 0.2, 0.98, 0.98), ("d", 6, 5, 0.1, 0.97, 0.99),
            ("e", 16, 5, 0.0, 1, 1),
        )
    ]  # fmt: skip
    said = of_frontier({"model": "m", "rows": rows})
    assert "`c` (5.00 bits)" in said
    assert "the score cosine prefers `b` (0.9900) to `d` (0.9700), which has 6.0 times less mean logit MSE" in said
    assert "the output cosine ranks them as the mean logit MSE does" in said


def test_no_measured_figure_is_typed_into_the_prose():
    """Numbers of the prose are those of definitions: bounds, thresholds, the published case."""
    import re

    prose = (ROOT / "docs" / "lab.in.md").read_text().replace("Qwen2.5", "Qwen")
    defined = {"0.25", "0.8", "0.2", "0.10", "0.05", "1.10", "0.334", "0.337", "1.28", "1.21", "1.14"}
    assert set(re.findall(r"\d+\.\d+", prose)) <= defined
