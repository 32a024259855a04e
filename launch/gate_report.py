"""What a gate run shows and writes: a table of figures, sentences, JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from sgl_hq.gate.bounds import BOUNDS, TOP_K
from sgl_hq.gate.figures import Trial, failing_bounds, summarize

Summary = dict[str, Any]
_LIMITS = {bound.figure: f"{'≤' if bound.at_most else '≥'} {bound.limit:g}" for bound in BOUNDS}


def table(summaries: Mapping[str, Summary], title: str) -> Table:
    """One column for each format."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=title, title_justify="left")
    out.add_column("")
    out.add_column("bound", no_wrap=True)
    for name in summaries:
        out.add_column(name, justify="right", no_wrap=True)
    for label, bound, show in _LINES:
        out.add_row(label, bound, *(show(summary) for summary in summaries.values()))
    return out


def sentences(summaries: Mapping[str, Summary], trials: Mapping[str, Sequence[Trial]]) -> list[str]:
    """For each failed format: which bounds, and the worst trial."""
    lines = []
    for name, summary in summaries.items():
        if summary["verdict"] == "pass":
            continue
        worst = max((t for t in trials[name] if not t.strict), key=lambda t: (len(t.broken_bounds), t.mse_max))
        lines.append(
            f"{name} fails: {'; '.join(failing_bounds(summary))}. Worst trial: {worst.window}, {worst.prefix_tokens:,} tokens."
        )
    return lines


def smallest_passing(summaries: Mapping[str, Summary]) -> str | None:
    passed = [name for name, summary in summaries.items() if summary["verdict"] == "pass"]
    return min(passed, key=lambda name: summaries[name]["stored_bits"], default=None)


def json_object(facts: dict[str, Any], trials: Mapping[str, Sequence[Trial]], rows: Mapping[str, Sequence[dict]]) -> dict:
    """One format: its figures and `facts` at the top. Several: `facts`, and a list `formats`. rows: trials as JSON."""
    found = []
    for name, of_format in trials.items():
        summary = summarize(of_format)
        found.append({"format": name, **summary, "failing_bounds": failing_bounds(summary), "rows": list(rows[name])})
    if len(found) == 1:
        return facts | found[0]
    smallest = smallest_passing({entry["format"]: entry for entry in found})
    return facts | {"smallest_passing": smallest, "formats": found}


def _number(key: str, digits: int) -> Callable[[Summary], str]:
    return lambda summary: f"{summary[key]:.{digits}f}"


def _signed(key: str) -> Callable[[Summary], str]:
    return lambda summary: f"{summary[key]:+.2f}"


_LINES: tuple[tuple[str, str, Callable[[Summary], str]], ...] = (
    ("verdict", "", lambda s: f"[{'green' if s['verdict'] == 'pass' else 'red'}]{s['verdict']}[/]"),
    ("strict trials", "all", lambda s: f"{s['strict_trials']}/{s['trials']}"),
    ("logit MSE, worst step", _LIMITS["mse_max"], _number("mse_max", 3)),
    ("  mean", "", _number("mse_mean", 4)),
    ("  worst, common shift removed", "", _number("variance_mse_max", 3)),
    (f"top-{TOP_K} overlap, worst step", _LIMITS["topk_min"], _number("topk_min", 1)),
    ("next token equal, judged steps", _LIMITS["argmax_equal"], _number("argmax_equal", 3)),
    ("  all steps", "", _number("argmax_agreement", 3)),
    ("attention output L2, worst step", _LIMITS["rel_l2_max"], _number("rel_l2_max", 3)),
    ("KL, mean, nats", "", _number("kl_mean", 5)),
    ("  worst step", "", _number("kl_max", 4)),
    ("perplexity change, %", "", _signed("ppl_change_percent")),
    ("stored bits per value", "", _number("stored_bits", 3)),
    ("  effective bits", "", _number("effective_bits", 3)),
)
