"""One panel as an SVG element for an HTML page, drawn by matplotlib, text kept as text.

Axes and text take the colour of the page around them, so that a plot reads on light and on dark ground; the arms'
colours have a contrast of at least 3:1 on both. An arm has the same colour, marker and dashes in every plot.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#7f7f7f", "#e0670a", "#d0479a", "#2f8fd8", "#1f9e6e", "#8f6be0", "#c08a00", "#d9534f", "#00a0a8")
_DASHES = ("-", "--", "-.", ":")
_MARKERS = "osD^vPX*h"
INK = "#0b0c0d"  # stands for the page's text colour until the SVG is written
_PARAMETERS = {
    "svg.fonttype": "none", "svg.hashsalt": "sgl_hq",  # text stays text; the same rows give the same file
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "grid.color": INK, "grid.alpha": 0.15, "axes.grid": True, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "font.size": 11, "legend.frameon": False,
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """`svg` is an element for an HTML page with `title` and `description` in it."""

    title: str
    description: str
    svg: str


def style(number: int) -> tuple[str, str, str]:
    """Colour, dashes and marker of a result's arm of this number; up to nine arms differ in both colour and marker."""
    return COLOURS[number % len(COLOURS)], _DASHES[number % len(_DASHES)], _MARKERS[number % len(_MARKERS)]


def svg_plot(title: str, description: str, draw: Callable[[Axes], None]) -> Plot:
    """One panel, drawn by `draw`, its legend below it."""
    with matplotlib.rc_context(_PARAMETERS):
        figure = Figure(figsize=(6, 4.6), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        draw(axes)
        figure.legend(loc="outside lower center", ncols=3, handlelength=3)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Plot(title, description, _element(written.getvalue(), title, description))


def _element(svg: str, title: str, description: str) -> str:
    """The file's <svg> with a name for screen readers; ids get a prefix of their own, since one page holds many plots."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)  # the page has the style
    prefix = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = svg.replace(INK, "currentColor")
    size = re.search(r'viewBox="[^"]+"', svg).group()
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {size} role="img" '
        f'aria-labelledby="{prefix}-title {prefix}-desc"><title id="{prefix}-title">{html.escape(title)}</title>'
        f'<desc id="{prefix}-desc">{html.escape(description)}</desc>'
    )
    return head + svg[svg.index(">") + 1 :].strip()
