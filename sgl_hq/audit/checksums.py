"""Do packed pages still hold the bytes that were packed?

The checksum of a page is the sum of the int32 words of its records over all layers and heads, and of its sink slot, as int64 on the
device of the arena. Nothing here waits for the device: comparisons are collected, and read with the next audit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sgl_hq.pool.packed_tier import NO_SINK, PackedTier


class PageChecksums:
    def __init__(self, tier: PackedTier):
        self._tier = tier
        self._device = tier.records[0].device
        self._taken = torch.zeros(tier.sizes.packed_pages, dtype=torch.int64, device=self._device)
        self._next = 0  # position of the sample among the used pages, so that each has its turn
        self._compared: list[tuple[list[int], torch.Tensor]] = []  # pages, and whether each differs: [n] bool on the device

    def take(self, pages: Sequence[int]) -> None:
        """Right after packing."""
        self._taken[self._ids(pages)] = self.sums(pages)

    def moved(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """The bytes of `sources` are in `targets` now, and are to stay what they were."""
        self._taken[self._ids(targets)] = self._taken[self._ids(sources)]

    def check(self, pages: Sequence[int]) -> None:
        """Compare `pages` now; `read` has the answer. Before they are dropped, and for samples."""
        if pages:
            self._compared.append((list(pages), self.sums(pages) != self._taken[self._ids(pages)]))

    def check_sample(self, used: Sequence[int], most: int) -> None:
        """Compare up to `most` of the used pages, the next ones each time."""
        start = self._next if self._next < len(used) else 0
        self.check(used[start : start + most])
        self._next = start + most

    def pending(self) -> torch.Tensor:
        """[n] bool on the device: the answers of all checks since the last `differing`."""
        return torch.cat([torch.zeros(0, dtype=torch.bool, device=self._device), *(differs for _, differs in self._compared)])

    def differing(self, answers: Sequence[bool]) -> list[int]:
        """Pages whose bytes have changed. answers: `pending()` on the host."""
        pages = [page for checked, _ in self._compared for page in checked]
        self._compared.clear()
        return sorted({page for page, differs in zip(pages, answers, strict=True) if differs})

    def sums(self, pages: Sequence[int]) -> torch.Tensor:
        """[len(pages)] int64 checksums of the bytes that are there now."""
        tier, ids = self._tier, self._ids(pages)
        total = sum(_word_sums(layer, ids) for layer in tier.records)
        with_sink = [(i, tier.sink_slot(page)) for i, page in enumerate(pages) if tier.sink_slot(page) != NO_SINK]
        if with_sink:
            which, slots = (self._ids(column) for column in zip(*with_sink))
            total.index_add_(0, which, sum(_word_sums(layer, slots) for layer in tier.sink_slots))
        return total

    def _ids(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(list(numbers), dtype=torch.int64, device=self._device)


def _word_sums(layer: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """layer: [slots, kv_heads, bytes] uint8, whole words; rows: [n] int64. Returns [n] int64."""
    return layer.index_select(0, rows).view(torch.int32).sum(dim=(1, 2), dtype=torch.int64)
