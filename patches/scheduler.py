"""`sglang.srt.managers.scheduler`: what /server_info says about us, and the moments at which we look at the server."""

from __future__ import annotations

from sgl_hq.monitor import Monitor

_monitor: Monitor | None = None  # of the one scheduler of this process


def bind_monitor(monitor: Monitor) -> None:
    global _monitor
    _monitor = monitor


def add_state(result, _scheduler, _recv_req):
    """AFTER Scheduler.get_internal_state."""
    result.internal_state["hq"] = _monitor.state()


def batch_done(_result, scheduler, _batch, _batch_result):
    """AFTER Scheduler.process_batch_result: SGLang's books are at rest, with the overlap schedule too."""
    scheduler.tree_cache.batch_done()
    _monitor.batch_done()


def idle(scheduler):
    """BEFORE Scheduler.on_idle, which may sleep."""
    scheduler.tree_cache.settle()
    _monitor.idle()
