"""`sglang.srt.managers.scheduler`: what /server_info says about us."""

from __future__ import annotations


def add_state(result, scheduler, _recv_req):
    """AFTER Scheduler.get_internal_state."""
    from sgl_hq.server_state import describe

    result.internal_state["hq"] = describe(scheduler)
