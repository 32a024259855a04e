"""Requests longer than the dense tier: packed pages of their prefix take nothing of it.

SGLang bounds a request by `max_total_num_tokens`, here the dense tier, when it arrives (`scheduler.py` init_req_max_new_tokens, `tp_worker.py`
get_worker_info). How much of it is packed is known only when its prefix is matched; so the bound on arrival counts both tiers, and
here, right before `schedule_policy.py` PrefillAdder.add_one_req, the request is held to the dense tier. What could never be placed
is ended: in the queue it would stand before all others for ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS
from sglang.srt.utils import ceil_align

from sgl_hq.page_format import PAGE_TOKENS

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sgl_hq.cache.packing_radix_cache import PackingRadixCache


def hold_to_dense_tier(tree: PackingRadixCache, dense_tokens: int, request: Req) -> None:
    """Give `request`, whose prefix was matched just now, a need of dense tokens that an otherwise empty tier can meet.

    dense_tokens: capacity of the tier. Where need and answer are too long together, the dense part of the prefix is packed, then
    the answer is cut, as SGLang cuts it to its pool. A request that is too long all the same ends with an error that says so.
    """
    room = dense_tokens // PAGE_TOKENS * PAGE_TOKENS - PAGE_TOKENS  # need + answer must stay below, as in PrefillAdder.add_one_req
    answer = max(0, request.sampling_params.max_new_tokens - len(request.output_ids))
    if ceil_align(len(request.full_untruncated_fill_ids), PAGE_TOKENS) + answer < room:
        return
    need = _dense_need(tree, request)
    if need + min(answer, CLIP_MAX_NEW_TOKENS) >= room:
        tree.pack_path(request.last_node)
        if tree.settle():
            request.init_next_round_input(tree)  # the prefix has other ids now
            need = _dense_need(tree, request)
    if need + 1 >= room:
        request.set_finish_with_abort(
            f"sgl_hq: the request needs {need} tokens of KV that are not packed, and the dense tier holds {dense_tokens}: shorten it, send "
            f"its beginning as a request of its own first (cached and packed, it takes {'less' if tree.elastic else 'nothing'} of the dense "
            f"tier), {'' if tree.elastic else 'lower --hq-packed-fraction '}or raise the KV budget"
        )
        request.init_next_round_input(tree)  # one token is left of it, and one step
        need = room - 2
    request.sampling_params.max_new_tokens = len(request.output_ids) + min(answer, room - need - 1)


def _dense_need(tree: PackingRadixCache, request: Req) -> int:
    """Dense tokens that the request occupies when its prefill ends, in whole pages, and those whose memory its packed pages hold."""
    packed = tree.packed_run(request.last_node).tokens
    return ceil_align(len(request.full_untruncated_fill_ids) - packed, PAGE_TOKENS) + tree.pinned_tokens(packed // PAGE_TOKENS)
