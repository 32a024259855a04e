"""The terminal report: no row and no figure is lost, memory and latency stay apart, and what failed is said."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from load_ab.result_example import ARMS, FAILURE, REPEATS, result_example
from sgl_hq.launch.load_ab.readme_table import readme_table
from sgl_hq.launch.load_ab.report_cells import CACHE, CARDS, LATENCY, MEMORY, Column, budget_line, cell, load_line
from sgl_hq.launch.load_ab.report_html import page
from sgl_hq.launch.load_ab.report_tables import show, tables
from sgl_hq.launch.load_ab.result_view import ReportError, ResultView

CASE = ("shared-1.3", "warm")
WIDTHS = (40, 80, 400)


@pytest.fixture
def result():
    return result_example()


def summary_row(result, arm, case=CASE):
    return next(row for row in result["summary"] if (row["arm"], row["workload"], row["phase"]) == (arm, *case))


def column(figure):
    return next(column for card in CARDS for column in card.columns if column.figure == figure)


def printed(result, width=400):
    out = io.StringIO()
    show(result, Console(file=out, width=width, force_terminal=True, color_system=None))
    return out.getvalue()


def test_every_figure_stands_in_one_card_and_in_the_right_one(result):
    cards = {"memory": MEMORY, "latency": LATENCY, "cache": CACHE, "answers": CACHE}
    figures = summary_row(result, "vanilla")["figures"]
    for name, figure in figures.items():
        assert [card.name for card in CARDS for c in card.columns if c.figure == name] == [cards[figure["card"]].name]
    assert sum(len(card.columns) for card in CARDS) == len(figures)


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut(result, width):
    view, text = ResultView(result), printed(result, width)
    assert "…" not in text
    for case in view.cases:
        for card in CARDS:
            for shown in (cell(view, arm, case, c) for arm in view.arms for c in card.columns):
                assert f"{shown.value} {shown.ratio}".strip() in text and shown.interval in text


@pytest.mark.parametrize("width", WIDTHS)
def test_every_part_of_a_table_has_all_arms_and_every_memory_row_its_reuse_factor_and_p(result, width):
    view = ResultView(result)
    for card in CARDS:
        parts = tables(view, CASE, card, width)
        assert len(parts) == 1 or width < 400
        for part in parts:
            assert part.row_count == len(ARMS)
            headings = [str(c.header).replace("\n", " ") for c in part.columns]
            assert card is not MEMORY or headings[2:4] == ["reuse factor", "packed fraction p"]


def test_parts_stay_within_the_width(result):
    for card in CARDS:
        for part in tables(ResultView(result), CASE, card, 100):
            assert Console(width=1000).measure(part).maximum <= 100


def test_missing_figure_is_a_dash_and_the_row_stays(result):
    summary_row(result, "hq4")["figures"]["requests_s"]["mean"] = None
    assert cell(ResultView(result), "hq4", CASE, column("requests_s")).value == "-"
    (part,) = tables(ResultView(result), CASE, LATENCY, 400)
    assert part.row_count == len(ARMS)


def test_cells_hold_value_ratio_and_interval(result):
    for arm, figures in (("vanilla", (200.0, 190.0, 210.0)), ("hq4", (500.0, 480.5, 530.0))):
        summary_row(result, arm)["figures"]["output_tok_s"] |= dict(zip(("mean", "low", "high"), figures))
    assert cell(ResultView(result), "hq4", CASE, column("output_tok_s")) == ("500.0", "2.50x", "480.5 to 530.0")
    megabytes = Column("output_tok_s", "test", "MB", 1, 1, 100.0)
    assert cell(ResultView(result), "hq4", CASE, megabytes) == ("5.0", "2.50x", "4.8 to 5.3")


def test_no_interval_with_one_repeat_and_no_ratio_to_nothing(result):
    summary_row(result, "hq4")["figures"]["requests_s"] |= {"low": None, "high": None, "n": 1}
    summary_row(result, "vanilla")["figures"]["requests_s"]["mean"] = None
    shown = cell(ResultView(result), "hq4", CASE, column("requests_s"))
    assert shown.ratio == "" and shown.interval == ""


def test_failed_arm_is_named_once_with_its_sentence(result):
    text = " ".join(printed(result).split())
    assert text.count(FAILURE) == 1 and f"FAILED: hicache, everywhere: {FAILURE}" in text


def test_one_failed_repeat_fails_the_case_and_only_that(result):
    run = next(r for r in result["runs"] if (r["arm"], r["workload"], r["phase"], r["repeat"]) == ("hq4", *CASE, 1))
    run["failure"] = "the server stopped answering"
    view = ResultView(result)
    assert view.runs("hq4", CASE) == [] and len(view.runs("hq4", ("shared-1.3", "cold"))) == REPEATS
    assert ("hq4", "shared-1.3, warm", "the server stopped answering") in view.failures


def test_what_was_not_run_is_said_and_did_not_fail(result):
    for rows in (result["runs"], result["summary"]):
        rows[:] = [row for row in rows if (row["arm"], row["workload"]) != ("hq6", "gsm8k")]
    view = ResultView(result)
    assert view.arms == tuple(ARMS)
    assert ("hq6", "gsm8k, cold; gsm8k, warm") in view.left_out and "hq6" not in [arm for arm, _, _ in view.failures]
    assert "Not run: hq6, gsm8k, cold; gsm8k, warm" in " ".join(printed(result).split()) and "hq6 FAILED" not in printed(result)
    assert "- Not run: hq6, gsm8k, cold; gsm8k, warm" in readme_table([result]) and "What was not run" in page(result)


def test_budget_line_states_every_arm_and_host_bytes(result):
    line = budget_line(ResultView(result))
    assert "11,468.8 MB an arm" in line and "hq4 11,463.8" in line and "host memory besides: hicache 34,359.7 MB" in line


PACES = {
    ("shared", None): "64 at a time",
    ("shared", 2.5): "2.5 arriving a second on average",
    ("trace", None): "arriving as in the trace",
}


@pytest.mark.parametrize("kind, rate", PACES)
def test_load_line_states_pace_and_what_differs_between_repeats(result, kind, rate):
    run = result["runs"][0]
    run["kind"], run["load"] = kind, run["load"] | {"output_tokens": 1000, "rate": rate}
    expected = f"96 requests of 8,256 prompt tokens each, 1,000 to 3,072 output tokens in all, {PACES[kind, rate]}."
    assert load_line(ResultView(result), ("shared-1.3", "cold")) == expected


def test_result_without_rows_is_refused(result):
    with pytest.raises(ReportError, match="holds no row"):
        show(result | {"summary": []})


def test_the_label_of_chats_is_the_length_of_their_last_turn(result):
    result["runs"][0]["kind"] = "multiturn"
    assert "96 requests of up to 8,256 prompt tokens, " in load_line(ResultView(result), ("shared-1.3", "cold"))
