"""A figure is made from the reading that the table states for it, and from no other."""

from __future__ import annotations

import pytest

from sgl_hq.launch.load_ab.figures import DEFINITIONS, Amount, Figure, Reading, WrongReading, figure_rows

# The names that runner, report and README agreed on.
AGREED = {
    "memory": "kv_bytes_allocated kv_bytes_used_peak kv_bytes_used_mean resident_tokens_peak resident_tokens_mean bytes_per_resident_token "
    "host_kv_bytes packed_fraction packed_fraction_peak reuse_factor max_context_tokens max_running modelled_gain measured_gain",
    "cache": "logical_tokens_attended hit_rate ideal_hit_rate evicted_tokens recomputed_tokens retractions",
    "latency": "ttft_ms_p50 ttft_ms_p90 ttft_ms_p99 tpot_ms_p50 tpot_ms_p90 tpot_ms_p99 e2e_ms_p50 e2e_ms_p90 e2e_ms_p99 "
    "output_tok_s requests_s",
    "answers": "task_score requests_failed",
}
UNITS = {"bytes", "tokens", "ms", "1/s", "tokens/s", "ratio", "count"}


def test_the_table_has_the_agreed_figures_on_their_cards():
    by_card = {card: [name for name, d in DEFINITIONS.items() if d.card == card] for card in AGREED}
    assert by_card == {card: names.split() for card, names in AGREED.items()}
    assert {d.unit for d in DEFINITIONS.values()} == UNITS


def test_no_two_figures_state_the_same_quantity():
    assert len({d.quantity for d in DEFINITIONS.values()}) == len(DEFINITIONS)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_only_the_stated_reading_makes_the_figure(name):
    stated = DEFINITIONS[name].readings
    assert Figure(name, Amount(1.0, stated)).as_row()["value"] == 1.0
    for other in [(reading,) for reading in Reading] + [stated + stated, ()]:
        if other != stated:
            with pytest.raises(WrongReading, match=name):
                Figure(name, Amount(1.0, other))


def test_the_original_mistake_cannot_be_written_down():
    """Allocated bytes under a figure of used bytes, by name and inside a quotient."""
    allocated, resident = Amount(11.5e9, (Reading.ALLOCATED,)), Amount(200_000, (Reading.RESIDENT,))
    with pytest.raises(WrongReading, match="kv_bytes_used_peak is made from USED, this number from ALLOCATED"):
        Figure("kv_bytes_used_peak", allocated)
    with pytest.raises(WrongReading, match="from USED, RESIDENT, this number from ALLOCATED, RESIDENT"):
        Figure("bytes_per_resident_token", allocated.per(resident))
    with pytest.raises(WrongReading, match="from RESIDENT, USED, this number from USED, RESIDENT"):
        Figure("measured_gain", Amount(1.0, (Reading.USED,)).per(resident))


def test_quotients():
    two, four = Amount(2.0, (Reading.CACHED,)), Amount(4, (Reading.PROMPT,))
    assert two.per(four) == Amount(0.5, (Reading.CACHED, Reading.PROMPT))
    assert two.times(3).per(four).value == 1.5
    nothing = Amount(None, (Reading.CACHED,))
    assert two.per(four.times(0)).value is None and two.per(nothing).value is None and nothing.times(2).per(two).value is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_values_that_no_counter_gives(value):
    with pytest.raises(WrongReading, match="hit_rate is"):
        Figure("hit_rate", Amount(value, DEFINITIONS["hit_rate"].readings))


def test_figure_rows_are_complete_and_in_order():
    amounts = {name: Amount(None, d.readings) for name, d in reversed(DEFINITIONS.items())}
    rows = figure_rows(amounts)
    assert list(rows) == list(DEFINITIONS) and set(rows["hit_rate"]) == {"value", "unit", "card", "quantity", "source"}
    del amounts["retractions"]
    with pytest.raises(WrongReading, match="No amount for retractions"):
        figure_rows(amounts)
    with pytest.raises(WrongReading, match="no figure 'bytes'"):
        Figure("bytes", Amount(1.0, (Reading.USED,)))
