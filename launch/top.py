"""`sgl-hq top URL`: what the two tiers of one server hold and do, live in a terminal."""

from __future__ import annotations

import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sgl_hq.launch.scrape import Scrape, scrape
from sgl_hq.metrics import catalogue as names

_STATES = ("live", "cached", "free")
_BAR_CELLS = 40
_OPERATIONS = {
    "pack": "packed when shared or inserted",
    "demote": "packed instead of evicted",
    "drop_packed": "dropped from the packed tier",
    "drop_dense": "evicted from the dense tier",
}


def run(url: str, interval_s: float, once: bool, console: Console | None = None) -> None:
    """Until Ctrl-C; with `once` one frame, whose rates are those between two scrapes. Raises ScrapeError."""
    console = console or Console()
    before = scrape(url, time.monotonic)
    if once:
        time.sleep(interval_s)
        console.print(frame(scrape(url, time.monotonic), before))
        return
    with Live(frame(before, before), console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(interval_s)
                now = scrape(url, time.monotonic)
                live.update(frame(now, before), refresh=True)
                before = now
        except KeyboardInterrupt:
            pass


def frame(now: Scrape, before: Scrape) -> Group:
    """One picture; rates are differences of counters between the two scrapes."""
    return Group(_title(now), _tiers(now), _reading(now, before), _pages(now, before), _refusals(now, before))


def _title(now: Scrape) -> Text:
    info = now.info
    text = Text(f"sgl_hq {info['version']}  format {info['format']}  pack {info['pack']}  gate {info['gate']}")
    if findings := sum(now.by(names.AUDIT_FINDINGS, "check").values()):
        text.append(f"  AUDIT FINDINGS: {findings:.0f}, see the server's log", style="bold red")
    return text


def _tiers(now: Scrape) -> Table:
    table = _table("tier", "use", "pages", *_STATES, "GB used")
    for tier in ("dense", "packed"):
        pages = {state: now.get(names.PAGES, tier=tier, state=state) for state in _STATES}
        used = sum(now.get(names.BYTES, tier=tier, state=state) for state in ("live", "cached"))
        total = sum(pages.values())
        bar = ProgressBar(total=max(total, 1), completed=total - pages["free"], width=_BAR_CELLS)
        table.add_row(tier, bar, f"{total:,.0f}", *(f"{pages[state]:,.0f}" for state in _STATES), f"{used / 1e9:.3f}")
    return table


def _reading(now: Scrape, before: Scrape) -> Table:
    read, attended = (_rate(now, before, name) for name in (names.TOKENS_READ, names.TOKENS_ATTENDED))
    groups = _rate(now, before, names.GROUP_SIZE + "_count")
    requests = _rate(now, before, names.GROUP_SIZE + "_sum")
    table = _table("reading", "now", "since the start")
    table.add_row("packed tokens read /s", f"{read:,.0f}", f"{now.get(names.TOKENS_READ):,.0f} tokens")
    table.add_row("packed tokens attended /s", f"{attended:,.0f}", f"{now.get(names.TOKENS_ATTENDED):,.0f} tokens")
    table.add_row("reuse factor (attended / read)", _ratio(attended, read), f"{now.get(names.REUSE_FACTOR):.1f}")
    total = now.get(names.GROUP_SIZE + "_sum"), now.get(names.GROUP_SIZE + "_count")
    table.add_row("requests a group, mean", _ratio(requests, groups), _ratio(*total))
    table.add_row("packed fraction of resident tokens", f"{now.get(names.PACKED_FRACTION):.2f}", "")
    table.add_row("dense pages lent to the packed tier", f"{now.get(names.LENT_PAGES):,.0f}", _slabs(now))
    table.add_row("requests that hold KV", f"{now.get(names.LIVE_REQUESTS):.0f}", "")
    return table


def _slabs(now: Scrape) -> str:
    lent, back = (now.get(names.SLABS_MOVED, operation=operation) for operation in ("lend", "reclaim"))
    return f"{lent:,.0f} slabs lent, {back:,.0f} had back"


def _pages(now: Scrape, before: Scrape) -> Table:
    table = _table("pages", "/s", "since the start", "mean ms")
    for operation, meaning in _OPERATIONS.items():
        timed = {"operation": operation.partition("_")[0]}
        seconds = now.get(names.OPERATION_SECONDS + "_sum", **timed), now.get(names.OPERATION_SECONDS + "_count", **timed)
        rate = _rate(now, before, names.PAGES_MOVED, operation=operation)
        table.add_row(meaning, f"{rate:,.1f}", f"{now.get(names.PAGES_MOVED, operation=operation):,.0f}", _ratio(seconds[0] * 1e3, seconds[1]))
    return table


def _refusals(now: Scrape, before: Scrape) -> Table:
    table = _table("refused to pack", "/s", "since the start")
    for reason, count in sorted(now.by(names.REFUSALS, "reason").items()):
        style = "yellow" if count else "dim"
        table.add_row(reason, f"{_rate(now, before, names.REFUSALS, reason=reason):,.1f}", f"{count:,.0f}", style=style)
    return table


def _rate(now: Scrape, before: Scrape, name: str, **labels: str) -> float:
    """Per second; 0 where the counter began again, as after a restart of the server."""
    seconds = now.at_s - before.at_s
    return max(0.0, now.get(name, **labels) - before.get(name, **labels)) / seconds if seconds > 0 else 0.0


def _ratio(above: float, below: float) -> str:
    return f"{above / below:.1f}" if below else "-"


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, show_edge=False, title=None)
    table.add_column(first, min_width=32)
    for name in others:
        table.add_column(name, justify="left" if name == "use" else "right")
    return table
