"""The texts that a calibration looks at: none of the gate's."""

from __future__ import annotations

from pathlib import Path

from sgl_hq.gate.windows import Window

_TEXTS = Path(__file__).parent / "texts"


def calibration_windows() -> tuple[Window, ...]:
    """Book, chat, code and repeated paragraphs."""
    files = sorted(_TEXTS.glob("*-*.*"))
    return tuple(Window(file.stem, file.stem.partition("-")[0], _text(file)) for file in files)


def _text(file: Path) -> str:
    text = file.read_text()
    return text + "\n" if file.stem.startswith("copy") else text
