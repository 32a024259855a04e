"""`unshared`: exact lengths, ordinary ids, nothing that a cache could have."""

from __future__ import annotations

from load_ab.word_tokenizer import WordTokenizer

from sgl_hq.launch.load_ab.workload_unshared import Unshared, request_sets


def test_nothing_is_shared():
    (phase,) = request_sets(Unshared(name="u", kind="unshared", requests=40, context=321, output=8), WordTokenizer(), seed=1)
    assert {len(request.prompt) for request in phase.requests} == {321} and phase.context == 321
    assert phase.ideal_cached_tokens == 0 and len({request.prompt[:64] for request in phase.requests}) == 40
    used = {token for request in phase.requests for token in request.prompt}
    assert min(used) == 3 and len(used) == 500  # neither special nor added ids, else the whole vocabulary
