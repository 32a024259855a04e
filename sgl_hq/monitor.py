"""What looks at a running server after each batch: the audit, and the metrics. One per scheduler process."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from sgl_hq import server_state

if TYPE_CHECKING:
    from sgl_hq.audit.audit import Audit
    from sgl_hq.metrics.exporter import Exporter

EXPORT_EVERY_S = 1.0


class Monitor:
    """sources: what `server_state` reads. exporter: None without --enable-metrics. audit: None without --hq-audit."""

    def __init__(self, sources: server_state.Sources, exporter: Exporter | None, audit: Audit | None):
        self._sources, self._exporter, self._audit = sources, exporter, audit
        self._exported_at, self._changed = float("-inf"), True
        if exporter is not None:
            sources.tree.tier_changed = self._on_tier_changed

    def batch_done(self) -> None:
        self._changed = True
        if self._audit is not None:
            self._audit.step()
        if self._exporter is not None and time.monotonic() - self._exported_at >= EXPORT_EVERY_S:
            self._export()

    def idle(self) -> None:
        """The scheduler has nothing to do; called in a loop. What the last batches changed is exported once."""
        if self._changed and self._exporter is not None:
            self._export()

    def state(self) -> dict[str, Any]:
        """The `hq` block of /server_info."""
        return server_state.figures(self._sources, self._audit) | server_state.costly_figures(self._sources)

    def _export(self) -> None:
        self._exporter.export(server_state.figures(self._sources, self._audit))
        self._exported_at, self._changed = time.monotonic(), False

    def _on_tier_changed(self) -> None:
        self._changed = True
        tree = self._sources.tree
        self._exporter.export_at_once({"packed": server_state.packed_in_use(tree)})
