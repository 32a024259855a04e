"""All checks together, every N batches."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from sgl_hq.audit import dense_pages
from sgl_hq.audit.checksums import PageChecksums
from sgl_hq.cache import books
from sgl_hq.rate_limited_log import RateLimitedLog

SAMPLE_PAGES = 32  # packed pages whose bytes an audit compares, beside those dropped since the last one
CHECKS = ("dense_pages", "packed_pages", "tree", "node_values", "checksum")


class AuditError(RuntimeError):
    """An audit found a difference, and --hq-audit-raise was asked for."""


class Audit:
    """tree: PackingRadixCache, whose packed pages get checksums from now on; allocator: SGLang's of the dense tier.

    every: batches between audits. raises: AuditError on a finding, instead of going on with a line in the log.
    """

    def __init__(self, tree, allocator, req_to_token: torch.Tensor, every: int, raises: bool):
        self._tree, self._every, self._raises = tree, every, raises
        self._dense = dense_pages.DensePages(allocator, tree, req_to_token)
        self._log = RateLimitedLog(logging.getLogger(__name__), logging.ERROR)
        self._batches = 0
        self._audits, self._seconds, self._findings = 0, 0.0, dict.fromkeys(CHECKS, 0)
        if tree.packed_tier is not None:
            tree.checksums = PageChecksums(tree.packed_tier)

    def step(self) -> None:
        """After each batch."""
        self._batches += 1
        if self._batches % self._every == 0:
            self.run()

    def run(self) -> dict[str, list[str]]:
        """Audit now: sentences by check, empty if all is well. Waits for the device once. Raises AuditError."""
        start_time = time.perf_counter()
        found = self._find()
        self._audits += 1
        self._seconds += time.perf_counter() - start_time
        for check, sentences in found.items():
            self._findings[check] += len(sentences)
            self._log.say(check, lambda: f"sgl_hq audit {self._audits}, {check}: {'; '.join(sentences)}")
        if found and self._raises:
            text = "; ".join(f"{check}: {'; '.join(sentences)}" for check, sentences in found.items())
            raise AuditError(f"sgl_hq audit: {text}. Drop --hq-audit-raise to serve on in spite of it, and report this line")
        return found

    def describe(self) -> dict[str, Any]:
        """For /server_info."""
        return {"every": self._every, "audits": self._audits, "seconds": self._seconds, "findings": dict(self._findings)}

    def _find(self) -> dict[str, list[str]]:
        tree, checksums = self._tree, self._tree.checksums
        if checksums is not None:
            checksums.check_sample([page for _, pages in tree.packed_nodes() for page in pages], SAMPLE_PAGES)
        holders, values_differ = self._dense.holders(), books.values_differ(tree)
        differ = checksums.pending() if checksums is not None else values_differ.new_zeros(0)
        answers = torch.cat([holders, values_differ.reshape(1).to(torch.int64), differ.to(torch.int64)]).cpu().numpy()
        pages_end = len(holders)
        changed = checksums.differing(answers[pages_end + 1 :].tolist()) if checksums is not None else []
        found = {
            "dense_pages": dense_pages.differences(answers[:pages_end]),
            "packed_pages": books.packed_differences(tree),
            "tree": books.tree_differences(tree),
            "node_values": ["nodes name other token ids than those of their pages"] if answers[pages_end] else [],
            "checksum": [f"bytes of packed pages changed since they were packed: {changed[:8]} ({len(changed)} in all)"] if changed else [],
        }
        return {check: sentences for check, sentences in found.items() if sentences}


NO_AUDIT = {"every": 0, "audits": 0, "seconds": 0.0, "findings": dict.fromkeys(CHECKS, 0)}
