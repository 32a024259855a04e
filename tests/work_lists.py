"""The work lists as the grouped kernels walk them, for tests."""

from __future__ import annotations

import numpy as np

from sgl_hq.kernels.grouped_attention.work import ITEM_WORDS, Grid


class Lists:
    """The buffer as the kernels walk it. `programs[kind][program]` are items (pages, rows, part, skip, where of their rows), pages by
    their packed ids, wherever they are read."""

    def __init__(self, words: np.ndarray, max_rows: int, grid: Grid) -> None:
        small, large, expand, rows, sinks = grid.sections(max_rows)
        assert words.dtype == np.int32 and small == 0
        self.parts = [words[words[rows + r] : words[rows + r + 1]].tolist() for r in range(max_rows)]
        assert words[rows + max_rows] == len(words), "the lists of parts end the buffer"
        self.sinks = words[sinks : grid.header_words(max_rows)].tolist()
        at, count = words[expand : expand + 2]
        self.expanded = words[at : at + count].tolist()
        self.programs = {
            kind: [
                [self._item(words, at) for at in range(words[start + p], words[start + p + 1], ITEM_WORDS)]
                for p in range(programs)
            ]
            for kind, start, programs in (("small", small, grid.small), ("large", large, grid.large))
        }

    def _item(self, words: np.ndarray, at: int) -> tuple[list[int], list[int], int, int, int]:
        where, n_pages, rows, n_rows, part, skip, expanded, unused = words[at : at + ITEM_WORDS].tolist()
        assert n_pages > 0 and n_rows > 0 and expanded in (0, 1) and unused == 0
        pages = words[where : where + n_pages].tolist()
        pages = [self.expanded[page] for page in pages] if expanded else pages
        return pages, words[rows : rows + n_rows].tolist(), part, skip, rows

    def items(self, kind: str) -> list:
        return [item for program in self.programs[kind] for item in program]
