"""Token ids for prompts: pieces of real text, and the ids that random prompts are drawn from."""

from __future__ import annotations

import pydoc_data.topics
import random
from importlib.resources import files
from pathlib import Path
from typing import Any

from sgl_hq.launch.workload import WorkloadError

MARK_TOKENS = 2  # enough for as many pieces as the square of the number of different tokens in the text


class TextPieces:
    """Pieces of running text, taken one after another, no two of which begin alike: so none shares a page with another.

    Real traces and working sets hold far more tokens than a book. So the cursor goes round and round through the text, and
    every piece begins with a mark of its own: two tokens of the text, another pair each time. Seed: where the text is
    entered and which pairs are taken.

    tokenizer: a transformers tokenizer. path: a UTF-8 text; None: the texts of the gate and the calibration and Python's
    reference, 660,000 characters. Raises WorkloadError for a text that cannot be read or is too short.
    """

    def __init__(self, tokenizer: Any, path: Path | None, seed: int):
        special = set(tokenizer.all_special_ids)
        ids = tokenizer(_text(path), add_special_tokens=False, verbose=False)["input_ids"]
        self._ids = [i for i in ids if i not in special]
        self._marks = sorted(set(self._ids))
        if not self._ids:
            raise WorkloadError(f"The text {path} has no tokens: give a longer one")
        draw = random.Random(f"text pieces {seed}")
        draw.shuffle(self._marks)
        self._cursor = draw.randrange(len(self._ids))
        self._taken = 0

    def take(self, tokens: int) -> tuple[int, ...]:
        """The next piece, `tokens` ids, at least MARK_TOKENS; raises WorkloadError when there are no marks left."""
        if tokens < MARK_TOKENS:
            raise ValueError(f"a piece has at least {MARK_TOKENS} tokens, not {tokens}")
        first, second = divmod(self._taken, len(self._marks))
        if first >= len(self._marks):
            raise WorkloadError(
                f"The text has {len(self._marks)} different tokens, enough to tell {self._taken} pieces apart: "
                "give a longer text or ask for fewer requests"
            )
        self._taken += 1
        piece = [self._marks[first], self._marks[second]]
        while len(piece) < tokens:
            run = self._ids[self._cursor : self._cursor + tokens - len(piece)]
            piece += run
            self._cursor = (self._cursor + len(run)) % len(self._ids)
        return tuple(piece)


def ordinary_ids(tokenizer: Any) -> list[int]:
    """Ids of the vocabulary that are neither special nor added to it (control and tool tokens), in order."""
    left_out = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    return sorted(set(tokenizer.get_vocab().values()) - left_out)


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a data file that a plan names; raises WorkloadError."""
    return _read(path, what).splitlines()


def _text(path: Path | None) -> str:
    if path is not None:
        return _read(path, "the text")
    packaged = (files(package) / "texts" for package in ("sgl_hq.gate", "sgl_hq.calibration"))
    texts = [entry for folder in packaged for entry in sorted(folder.iterdir(), key=lambda e: e.name) if entry.name.endswith(".txt")]
    topics = pydoc_data.topics.topics
    return "\n\n".join([*(entry.read_text(encoding="utf-8") for entry in texts), *(topics[name] for name in sorted(topics))])


def _read(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{what} {path} cannot be read as UTF-8 text ({error}): mend the path in the plan") from error
