"""Under pressure a slow device costs no cached prefix: as much is computed again as if packing took no time."""

from __future__ import annotations

import pytest
from replay_shared_prefixes import Load, Replay


@pytest.mark.parametrize("fmt, working_set", [("hq4", 3.3), ("hq6", 2.6)])
def test_late_packing_loses_no_more_than_packing_at_once(fmt, working_set):
    """A prefix more or less: the order in which packings end moves where the last of the memory goes."""
    load = Load(working_set=working_set)
    late, at_once = (Replay(load, fmt, at_once) for at_once in (False, True))
    for phase in range(2):
        ideal = load.ideal_tokens(phase)
        lost, least = (replay.phase(phase) - ideal for replay in (late, at_once))
        assert 0 <= lost <= least + load.prefix, (phase, lost, least)
    assert late.tree.counters.pages_dropped > 0, "not under pressure: this cannot fail"
    for replay in (late, at_once):
        replay.tree.check_books()
        assert replay.tree.protected_size() == 0


def test_nothing_is_lost_where_everything_fits():
    replay = Replay(Load(working_set=2.6), "hq4")
    doubly = replay.phase(0) - replay.load.ideal_tokens(0)
    assert doubly < 2 * replay.load.prefix, "requests that begin together may compute the same prefix"
    assert replay.phase(1) == replay.load.ideal_tokens(1) and replay.tree.counters.pages_dropped == 0
