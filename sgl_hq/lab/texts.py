"""Long texts to decode after: the gate's and the calibration's, joined, since 8,192 tokens are more than any of them has."""

from __future__ import annotations

from pathlib import Path

from sgl_hq.calibration.windows import calibration_windows
from sgl_hq.gate.windows import Window, shipped_windows, windows_of_files

_BETWEEN = "\n\n"


def lab_texts(files: list[Path] | None = None) -> tuple[Window, ...]:
    """`wikitext` and `code`, about 18,000 and 14,000 tokens; or the user's files. Raises GateError for an unreadable file."""
    if files:
        return windows_of_files(files)
    shipped = shipped_windows()
    return tuple(
        Window(name, "text", _BETWEEN.join(w.text for w in windows if w.name.startswith(f"{name}-")))
        for name, windows in (("wikitext", shipped), ("code", (*shipped, *calibration_windows())))
    )
