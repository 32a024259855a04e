"""The texts that the gate measures on: thirteen fixed ones, or the user's own files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sgl_hq.gate.errors import GateError

_TEXTS = Path(__file__).parent / "texts"
_MAX_COPIES = 64
# Held out: never used for choosing a format, a width or a rotation (formats were chosen on the core windows).
CORE = ("wikitext-1", "wikitext-2", "chat-1", "code-1", "copy-1")
HOLD_OUT = ("wikitext-3", "wikitext-4", "wikitext-5", "wikitext-6", "wikitext-7", "chat-2", "code-2", "copy-2")


@dataclass(frozen=True)
class Window:
    """kind: `text`, `chat` (turns through the model's chat template) or `copy` (one paragraph again and again)."""

    name: str
    kind: str
    text: str

    def token_ids(self, tokenizer: Any, tokens: int) -> list[int]:
        """The first `tokens` ids. Raises GateError when the text has fewer."""
        if self.kind == "chat":
            ids = _chat_ids(tokenizer, json.loads(self.text))
        else:
            ids = tokenizer(self.text * (_MAX_COPIES if self.kind == "copy" else 1), verbose=False)["input_ids"]
        if len(ids) < tokens:
            raise GateError(
                f"window {self.name} has {len(ids)} tokens, the longest prefix and the steps need {tokens}: "
                "give a longer text or a shorter --prefix"
            )
        return ids[:tokens]


def shipped_windows(names: tuple[str, ...] = (*CORE, *HOLD_OUT)) -> tuple[Window, ...]:
    return tuple(_shipped(name) for name in names)


def windows_of_files(paths: list[Path]) -> tuple[Window, ...]:
    """One window for each UTF-8 text file. Raises GateError for a file that cannot be read."""
    windows = []
    for path in paths:
        try:
            windows.append(Window(path.name, "text", path.read_text()))
        except (OSError, UnicodeDecodeError) as error:
            raise GateError(f"cannot read window {path} as text ({error}): give a UTF-8 text file") from error
    return tuple(windows)


@cache
def shipped_digest() -> str:
    """Of all shipped texts: a record made on other texts does not count."""
    digest = hashlib.sha256()
    for window in shipped_windows():
        digest.update(f"{window.name}\0{window.kind}\0{window.text}\0".encode())
    return digest.hexdigest()[:16]


def _shipped(name: str) -> Window:
    kind = name.partition("-")[0]
    if kind == "chat":
        return Window(name, "chat", (_TEXTS / f"{name}.json").read_text())
    text = (_TEXTS / f"{name}.txt").read_text()
    return Window(name, "copy", text + "\n") if kind == "copy" else Window(name, "text", text)


def _chat_ids(tokenizer: Any, turns: list[str]) -> list[int]:
    """turns: what the user and the assistant say, in turn, the user first."""
    if getattr(tokenizer, "chat_template", None) is None:
        speakers = ("User", "Assistant")
        return tokenizer("\n\n".join(f"{speakers[i % 2]}: {turn}" for i, turn in enumerate(turns)))["input_ids"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    # date_string: Llama's templates would otherwise write today's date into the text
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, date_string="26 Jul 2024")["input_ids"]
