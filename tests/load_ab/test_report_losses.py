"""Losses are found where they were planted, and nowhere else."""

from __future__ import annotations

import pytest

from load_ab.result_example import result_example
from sgl_hq.launch.load_ab.report_cells import CARDS
from sgl_hq.launch.load_ab.report_losses import loss_sentences
from sgl_hq.launch.load_ab.result_view import ResultView

CASE = ("gsm8k", "warm")
DIRECTED = [column for card in CARDS for column in card.columns if column.better]


@pytest.fixture
def result():
    """Every measured arm has vanilla's figures."""
    result = result_example()
    vanilla = {(row["workload"], row["phase"]): row["figures"] for row in result["summary"] if row["arm"] == "vanilla"}
    for row in result["summary"]:
        if row["figures"]:
            row["figures"] = {name: dict(figure) for name, figure in vanilla[row["workload"], row["phase"]].items()}
    return result


def figure(result, arm, name):
    row = next(row for row in result["summary"] if (row["arm"], row["workload"], row["phase"]) == (arm, *CASE))
    return row["figures"][name]


def sentence(result, arm="hq4"):
    return loss_sentences(ResultView(result))[("lossless", "hq6", "hq4").index(arm)]


def test_equal_arms_lose_nowhere(result):
    assert loss_sentences(ResultView(result)) == [
        f"{arm} is nowhere worse than the best other arm by more than 0.5%." for arm in ("lossless", "hq6", "hq4")
    ]


@pytest.mark.parametrize("column", DIRECTED, ids=lambda column: column.figure)
def test_planted_loss_is_stated_for_every_figure_with_a_direction(result, column):
    for arm in ("vanilla", "vanilla-fp8", "lossless", "hq6"):
        figure(result, arm, column.figure).update(mean=10.0, low=9.0, high=11.0)
    figure(result, "hq4", column.figure).update(mean=10.0 - 2 * column.better, low=7.5, high=12.5)
    assert sentence(result) == (
        f"hq4 is worse than the best other arm in {column.name} (1 of {2 if column.figure == 'task_score' else 6} cases, "
        f"at worst {1 - 0.2 * column.better:.2f} times vanilla's in gsm8k, warm; intervals overlap in 1)."
    )
    assert "nowhere" in sentence(result, "hq6")


@pytest.mark.parametrize("mean, stated", [(0.996, False), (0.994, True), (1.2, False)])
def test_margin(result, mean, stated):
    for arm in ("vanilla", "vanilla-fp8", "hq4"):
        figure(result, arm, "requests_s").update(mean=1.0, low=1.0, high=1.0)
    figure(result, "hq4", "requests_s").update(mean=mean, low=mean, high=mean)
    assert ("requests/s (" in sentence(result)) == stated and "overlap" not in sentence(result)


def test_the_best_other_arm_counts_not_the_first(result):
    figure(result, "vanilla-fp8", "ttft_ms_p50")["mean"] /= 2
    assert "TTFT p50 (1 of 6 cases, at worst 2.00 times vanilla-fp8's in gsm8k, warm" in sentence(result)


def test_loss_against_zero_and_without_intervals(result):
    figure(result, "hq4", "retractions").update(mean=3.0, low=None, high=None)
    assert "retractions (1 of 6 cases, at worst 3 against vanilla's 0 in gsm8k, warm; no interval in 1)" in sentence(result)


def test_failed_arms_of_ours_are_stated(result):
    for run in result["runs"]:
        if run["arm"] == "hq6" or (run["arm"], run["workload"], run["phase"]) == ("hq4", *CASE):
            run["failure"] = "ended"
    assert sentence(result, "hq6") == "hq6 failed everywhere."
    assert sentence(result, "hq4").endswith("It failed in gsm8k, warm.")


def test_without_other_arms_nothing_is_claimed(result):
    for rows in (result["runs"], result["summary"]):
        rows[:] = [row for row in rows if row["arm"] in ("hq6", "hq4")]
    assert loss_sentences(ResultView(result)) == [
        "No arm without this project's plugin was measured: there is nothing to lose against."
    ]
