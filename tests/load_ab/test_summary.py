"""Summary rows: means over repeats, percentiles over all requests, failed arms without figures, refusals in force."""

from __future__ import annotations

import json

import numpy as np
import pytest
from row_samples import good_row, requests

from sgl_hq.launch.load_ab.figures import DEFINITIONS
from sgl_hq.launch.load_ab.refusals import Incomparable
from sgl_hq.launch.load_ab.run_row import Drive, failed_row
from sgl_hq.launch.load_ab.summary import summarize


def rows(repeats: int = 3):
    made = [good_row(arm, repeat) for arm in ("vanilla", "hq4") for repeat in range(repeats)]
    for row in made:
        row["figures"]["requests_s"]["value"] = 10.0 + row["repeat"]
        row["per_request"]["ttft_ms"] = [t + 1000 * row["repeat"] for t in row["per_request"]["ttft_ms"]]
    return made


def test_one_row_for_each_arm_workload_and_phase():
    cold = [good_row(arm, phase="cold") for arm in ("vanilla", "hq4")]
    summary = summarize(rows() + cold)
    assert [(s["arm"], s["phase"], s["repeats"]) for s in summary] == [
        ("vanilla", "warm", 3), ("hq4", "warm", 3), ("vanilla", "cold", 1), ("hq4", "cold", 1),
    ]  # fmt: skip
    assert set(summary[0]) == {"arm", "workload", "kind", "phase", "repeats", "failure", "load", "figures"}
    assert list(summary[0]["figures"]) == list(DEFINITIONS)
    json.dumps(summary, allow_nan=False)


def test_means_and_intervals_over_repeats():
    figure = summarize(rows())[0]["figures"]["requests_s"]
    assert (figure["mean"], figure["n"], figure["unit"], figure["card"]) == (11.0, 3, "1/s", "latency")
    assert 10.0 <= figure["low"] < 11.0 < figure["high"] <= 12.0
    assert figure["quantity"] == DEFINITIONS["requests_s"].quantity
    alone = summarize(rows(repeats=1))[0]["figures"]["requests_s"]
    assert (alone["mean"], alone["low"], alone["high"], alone["n"]) == (10.0, None, None, 1)


def test_percentiles_are_of_all_requests_together():
    """The median of three repeats' medians would be 1,250 too, their 90th percentiles' mean 1,370."""
    figures = summarize(rows())[0]["figures"]
    pooled = [t + 1000 * repeat for repeat in range(3) for t in (100, 200, 300, 400)]
    for q in (50, 90, 99):
        figure = figures[f"ttft_ms_p{q}"]
        assert figure["mean"] == pytest.approx(np.percentile(pooled, q)) and figure["n"] == 12
        assert figure["low"] <= figure["mean"] <= figure["high"]


def test_the_scores_interval_is_that_of_the_questions():
    """One repeat of 400 questions, 200 right: the interval of a share, 1.96 sqrt(0.25 / 400) to each side."""
    made = rows(repeats=1)
    for row in made:
        row["per_request"]["right"] = [0, 1] * 200
        row["figures"]["task_score"]["value"] = 0.5
    score = summarize(made)[0]["figures"]["task_score"]
    assert (score["mean"], score["n"]) == (0.5, 400)
    assert (score["low"], score["high"]) == pytest.approx((0.451, 0.549), abs=0.01), "0.01: two standard deviations of 2,000 resamples' ends"


def test_the_same_questions_asked_again_do_not_narrow_the_scores_interval():
    once, twice = rows(repeats=1), rows(repeats=2)
    for row in (*once, *twice):
        row["per_request"]["right"], row["figures"]["task_score"]["value"] = [0, 1] * 50, 0.5
    assert summarize(once)[0]["figures"]["task_score"] == summarize(twice)[0]["figures"]["task_score"]


def test_what_was_not_measured_stays_empty():
    summary = summarize(rows())[0]["figures"]["task_score"]
    assert (summary["mean"], summary["low"], summary["high"], summary["n"]) == (None, None, None, 0)
    partly = rows()
    partly[0]["figures"]["max_context_tokens"]["value"] = 4096
    assert summarize(partly)[0]["figures"]["max_context_tokens"]["mean"] is None


def test_an_arm_with_a_failed_repeat_has_no_figures():
    failed = failed_row("hq4", requests(), Drive(4, None, 1), "The server ended.")
    made = [good_row("vanilla", repeat) for repeat in (0, 1)]
    summary = summarize([*made, good_row("hq4", 0), failed])
    assert summary[0]["failure"] is None and summary[0]["figures"]
    assert summary[1]["failure"] == "Repeat 1: The server ended." and summary[1]["figures"] == {}


def test_incomparable_rows_have_no_summary():
    planted = rows()
    planted[0]["requests_sha256"] = "other"
    with pytest.raises(Incomparable, match="request files"):
        summarize(planted)
