"""A request is held to the dense tier when its prefix is known: SGLang's own admission then places it on an idle server, always."""

import sys
from array import array
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))
from sgl_hq.config import AUTO
from two_tier_machine import DENSE_PAGES, SINKS, P, TwoTierMachine, prompt

DENSE = DENSE_PAGES * P


def _machine(pack: str, packed_fraction: float = 0.7) -> TwoTierMachine:
    machine = TwoTierMachine()
    machine.start(pack=pack, packed_fraction=packed_fraction)
    return machine


def _cache(machine: TwoTierMachine, pages: int) -> None:
    """A request of family 0 with that many whole pages was there, in turns as long as the machine's requests are."""
    for end in [*range(8, pages, 8), pages]:
        machine.arrive(family=0, shared_pages=end, own=1, salt=0)
        machine.leave(0, insert=True)


def _request(machine: TwoTierMachine, tokens: list[int], answer: int):
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    request = Req("long", "", array("q", tokens), SamplingParams(max_new_tokens=answer, temperature=0))
    request.init_next_round_input(machine.tree)
    return request


def _admit(machine: TwoTierMachine, request):
    """As the scheduler of an idle server does. Returns SGLang's verdict and the adder."""
    from sglang.srt.managers import schedule_policy
    from sglang.srt.runtime_context import get_parallel

    from sgl_hq.patches.long_requests import admit

    def no() -> bool:
        return False

    # Where no server runs these ask for the arguments of one.
    with (
        patch.object(schedule_policy, "is_dsa_prefill_cp_in_seq_split", no),
        patch.object(schedule_policy, "is_prefill_context_parallel_enabled", no),
        get_parallel().override(tp_rank=0),
    ):
        adder = schedule_policy.PrefillAdder(P, machine.tree, machine.allocator, None, 1.0, 16384, None)
        verdict = admit(schedule_policy.PrefillAdder.add_one_req, adder, request, has_chunked_req=False, truncation_align_size=None)
    return verdict, adder


@settings(deadline=None)
@given(
    pack=st.sampled_from(["shared", "insert", "pressure"]), packed_fraction=st.sampled_from([0.2, 0.5, 0.7, AUTO]),
    cached=st.integers(0, 10), more=st.integers(1, 2 * DENSE), answer=st.integers(1, 2 * DENSE),
)  # fmt: skip
def test_an_idle_server_places_every_request_or_ends_it(pack, packed_fraction, cached, more, answer):
    machine = _machine(pack, packed_fraction)
    if cached:
        _cache(machine, cached)
    request = _request(machine, prompt(0, cached, more, 1), answer)
    _, adder = _admit(machine, request)
    assert adder.can_run_list == [request]  # the verdict is about the next one
    if request.to_finish is None:
        assert 1 <= request.sampling_params.max_new_tokens <= answer
        packed = machine.tree.packed_run(request.last_node).tokens
        dense = machine.dense_tokens - machine.tree.pinned_tokens(packed // P)
        assert len(request.origin_input_ids) - packed + request.sampling_params.max_new_tokens < dense
    else:
        assert more > machine.dense_tokens - 3 * P - cached * P  # nothing shorter is refused
    machine.tree.dec_lock_ref(request.last_node)
    machine.no_token_is_lost()


def test_a_packed_prefix_takes_nothing_of_the_dense_tier():
    machine = _machine("insert")
    _cache(machine, 10)
    request = _request(machine, prompt(0, 10, DENSE - 3 * P, 1), answer=P // 2)
    assert len(request.origin_input_ids) > DENSE
    verdict, _ = _admit(machine, request)
    assert (verdict.name, request.to_finish, request.sampling_params.max_new_tokens) == ("CONTINUE", None, P // 2)


def test_the_dense_prefix_of_a_request_that_would_not_fit_is_packed():
    machine = _machine("pressure")
    _cache(machine, 10)
    assert not machine.tree.counters.pages_packed
    request = _request(machine, prompt(0, 10, DENSE - 3 * P, 1), answer=P // 2)
    verdict, _ = _admit(machine, request)
    assert (verdict.name, request.to_finish, request.sampling_params.max_new_tokens) == ("CONTINUE", None, P // 2)
    assert machine.tree.counters.pages_packed == 10


def test_a_request_that_fits_is_left_alone():
    machine = _machine("pressure")
    _cache(machine, 10)
    request = _request(machine, prompt(0, 10, 2 * P, 1), answer=P)
    _admit(machine, request)
    assert request.sampling_params.max_new_tokens == P and not machine.tree.counters.pages_packed


def test_an_answer_is_cut_to_the_dense_tier():
    machine = _machine("shared")
    request = _request(machine, prompt(0, 0, 100, 1), answer=5000)
    _admit(machine, request)
    assert request.sampling_params.max_new_tokens == DENSE - 2 * P - P - 1  # two pages of prompt, one that SGLang keeps back


def test_where_memory_moves_a_packed_prefix_takes_the_bytes_it_has():
    """Records of sink4-K8V8 have 55 % of a dense page's bytes: 10 pages of prefix take 6."""
    machine = TwoTierMachine()
    machine.start(pack="insert", packed_fraction=AUTO, fmt=SINKS)
    _cache(machine, 10)
    assert machine.tree.pinned_tokens(10) == 6 * P
    fits, too_long = (machine.dense_tokens - (6 + pages) * P for pages in (2, 1))
    for own, ends in ((fits, False), (too_long, True)):
        request = _request(machine, prompt(0, 10, own, 1), answer=P // 2)
        _admit(machine, request)
        assert (request.to_finish is not None) == ends
        machine.tree.dec_lock_ref(request.last_node)


def test_what_can_never_be_placed_ends_with_the_reason():
    machine = _machine("shared")
    request = _request(machine, prompt(0, 0, DENSE, 1), answer=1)
    _, adder = _admit(machine, request)
    assert "the dense tier holds" in request.to_finish.message and adder.can_run_list == [request]
    assert len(request.origin_input_ids) == 1


def test_mode_exact_has_one_tier_and_sglangs_bounds():
    from sgl_hq.patches.long_requests import longest_request

    info = (1000, 1, 1, 1, 999, 994, "rest")
    pool = SimpleNamespace(packed=None)
    worker = SimpleNamespace(model_runner=SimpleNamespace(token_to_kv_pool=pool), model_config=SimpleNamespace(context_len=4000))
    assert longest_request(lambda worker: info, worker) == info
    pool.packed, pool.most_tokens = "a tier", 1640
    assert longest_request(lambda worker: info, worker) == (1000, 1, 1, 1, 1639, 1634, "rest")
    worker.model_config.context_len = 1500
    assert longest_request(lambda worker: info, worker)[4:6] == (1499, 1494)
