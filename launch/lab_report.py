"""docs/lab.md from result files: `python -m sgl_hq.launch.lab_report docs` (needs the extra `docs`).

    docs/results/lab-*.json        what `sgl-hq ceiling`, `oracle` and `frontier` wrote with --json
    docs/lab.in.md                 the prose; {{ceilings}}, {{oracles}}, {{decisions}} and {{frontiers}} stand for what is made here
    docs/lab.md, lab-frontier-*.svg    written

No measured figure of a table is typed by hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sgl_hq.lab.oracle_rows import PASS
from sgl_hq.lab.projection import VERDICT_OVERHEAD, WORTH_BUILDING, speedup
from sgl_hq.launch.frontier import PANELS
from sgl_hq.launch.quality_report import plot

Result = dict[str, Any]
_DECISION_HEAD = ("target", "selector", "K, V read", "implementation verdict", f"projected speed at {VERDICT_OVERHEAD:.0%}", "conclusion")
_SHOWN_PROJECTIONS = ("no attention at all", "0.25 of the tokens", "hq7", "hq4", "4 sharers", "16 sharers")


def write(docs: Path) -> None:
    """Raises FileNotFoundError without results or prose."""
    results = [json.loads(path.read_text()) for path in sorted((docs / "results").glob("lab-*.json"))]
    if not results:
        raise FileNotFoundError(f"no lab-*.json in {docs / 'results'}: write them with sgl-hq ceiling, oracle or frontier and --json")
    ceilings, oracles, frontiers = ([r for r in results if r["lab"] == kind] for kind in ("ceiling", "oracle", "frontier"))
    parts = {
        "ceilings": _table(("model", "context x batch", "p_attn (least to most)", *_SHOWN_PROJECTIONS, "verdict"), _ceilings(ceilings)),
        "oracles": "\n\n".join(map(_oracle, oracles)),
        "decisions": _table(_DECISION_HEAD, _decisions(ceilings, oracles)),
        "frontiers": "\n\n".join(_frontier(result, docs) for result in frontiers),
    }  # fmt: skip
    text = (docs / "lab.in.md").read_text()
    for name, part in parts.items():
        text = text.replace("{{" + name + "}}", part)
    (docs / "lab.md").write_text(text)


def _table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """A sentence instead where there is no row."""
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines]) if lines else "Nothing is measured yet."


def _ceilings(ceilings: Sequence[Result]) -> Iterator[Sequence[str]]:
    for r in ceilings:
        at_verdict = {row["name"].split(",")[0]: row["at_verdict"] for row in r["rows"]}
        share = f"{r['p_attn']:.3f} ({r['p_attn_min']:.3f} to {r['p_attn_max']:.3f})"
        figures = (f"{at_verdict[name]:.2f}" for name in _SHOWN_PROJECTIONS)
        verdict = "open" if at_verdict[_SHOWN_PROJECTIONS[0]] >= WORTH_BUILDING else "**closed**"
        yield r["model"], f"{r['context_tokens']:,} x {r['batch']}", share, *figures, verdict


def _oracle(result: Result) -> str:
    head = ("selector", "implementation verdict", "steps within bounds", "tokens kept", "K, V read", "logit MSE worst", "top-10 worst",
            "tokens changed", "output L2 worst", "KL mean")  # fmt: skip
    title = f"### {result['model']}, {result['context_tokens']:,} tokens, {result['steps']} steps after each of {', '.join(result['texts'])}"
    return f"{title}\n\n{_table(head, map(_selector, result['selectors']))}"


def _selector(s: dict[str, Any]) -> Sequence[str]:
    mse, kl = _shown(s["mse_max"], ".3f"), _shown(s["kl_mean"], ".5f")
    return (
        f"`{s['selector']}`", f"**{PASS}**" if s["implementation_verdict"] == PASS else s["implementation_verdict"],
        f"{s['rows_within_bounds']}/{s['rows']}", f"{s['kept_fraction']:.3f}", f"{s['read_fraction']:.3f}", mse, f"{s['topk_min']:.1f}",
        f"{s['argmax_changed']}/{s['argmax_judged']}", f"{s['rel_l2_max']:.3f}", kl,
    )  # fmt: skip


def _shown(value: float | None, style: str) -> str:
    """Figures that are not finite are null in JSON."""
    return "inf" if value is None else f"{value:{style}}"


def _decisions(ceilings: Sequence[Result], oracles: Sequence[Result]) -> Iterator[Sequence[str]]:
    """The rule: worth building only if ceiling and oracle pass on the same model and context."""
    for ceiling in ceilings:
        for oracle in oracles:
            target = ("model", "context_tokens")
            if any(ceiling[key] != oracle[key] for key in target):
                continue
            where = f"{ceiling['model']}, {ceiling['context_tokens']:,} x {ceiling['batch']}"
            for s in oracle["selectors"]:
                speed = speedup(ceiling["p_attn"], min(1.0, s["read_fraction"]), VERDICT_OVERHEAD)
                verdict = s["implementation_verdict"]
                conclusion = "**worth building**" if speed >= WORTH_BUILDING and verdict == PASS else "closed"
                yield where, f"`{s['selector']}`", f"{s['read_fraction']:.3f}", verdict, f"{speed:.2f}", conclusion


def _frontier(result: Result, docs: Path) -> str:
    rows, name = result["rows"], f"lab-frontier-{result['model']}.svg"
    plot(result["model"], rows, docs / name, PANELS)
    figures = (
        ("stored bits", "stored_bits", ".3f"), ("effective", "effective_bits", ".3f"), ("output cosine", "output_cos_mean", ".6f"),
        ("worst", "output_cos_min", ".4f"), ("score cosine", "score_cos_mean", ".6f"), ("worst", "score_cos_min", ".4f"),
        ("logit MSE worst", "mse_max", ".3f"), ("mean", "mse_mean", ".4f"), ("KL mean", "kl_mean", ".5f"),
    )  # fmt: skip
    cells = (
        (f"`{row['format']}`", f"{row['strict_trials']}/{row['trials']}", *(_shown(row[key], style) for _, key, style in figures))
        for row in rows
    )
    prefixes = ", ".join(map(str, result["prefixes"]))
    title = f"### {result['model']}, prefixes of {prefixes} tokens, {result['steps']} steps after each of {len(result['texts'])} texts"
    table = _table(("format", "trials within bounds", *(label for label, _, _ in figures)), cells)
    return f"{title}\n\n![{result['model']}: stored bits against four figures]({name})\n\n{table}"


if __name__ == "__main__":
    write(Path(sys.argv[1]))
