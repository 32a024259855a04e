"""docs/lab.md from result files: `python -m sgl_hq.launch.lab_report docs` (needs the extra `plots`).

    docs/results/lab-*.json        what `sgl-hq ceiling`, `oracle` and `frontier` wrote with --json
    docs/lab.in.md                 the prose; {{conclusions}}, {{ceilings}}, {{oracles}} and {{frontiers}} stand for what is made here
    docs/lab.md, lab-frontier-*.svg    written

No measured figure is typed by hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sgl_hq.lab.oracle_rows import PASS
from sgl_hq.lab.projection import is_open
from sgl_hq.launch import lab_conclusions
from sgl_hq.launch.frontier import PANELS
from sgl_hq.launch.lab_decisions import CLOSED, Decision, Result, ceilings_of, decide, device, joined, where
from sgl_hq.launch.quality_report import plot

_SHOWN_PROJECTIONS = ("no attention at all", "0.25 of the tokens", "hq7", "hq4", "4 sharers", "16 sharers")
_CEILING_HEAD = ("model", "context", "on", "p_attn (least to most)", "K, V read at GB/s", *_SHOWN_PROJECTIONS, "verdict")


def write(docs: Path) -> None:
    """Raises FileNotFoundError without results or prose."""
    results = [json.loads(path.read_text()) for path in sorted((docs / "results").glob("lab-*.json"))]
    if not results:
        raise FileNotFoundError(f"no lab-*.json in {docs / 'results'}: write them with sgl-hq ceiling, oracle or frontier and --json")
    ceilings, oracles, frontiers = ([r for r in results if r["lab"] == kind] for kind in ("ceiling", "oracle", "frontier"))
    oracles = joined(oracles)
    parts = {
        "conclusions": "\n".join([*(lab_conclusions.of_target(o, ceilings) for o in oracles), *map(lab_conclusions.of_frontier, frontiers)]),
        "ceilings": _table(_CEILING_HEAD, map(_ceiling, ceilings)),
        "oracles": "\n\n".join(_oracle(o, ceilings) for o in oracles),
        "frontiers": "\n\n".join(_frontier(result, docs) for result in frontiers),
    }  # fmt: skip
    text = (docs / "lab.in.md").read_text()
    for name, part in parts.items():
        text = text.replace("{{" + name + "}}", part)
    (docs / "lab.md").write_text(text)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def _ceiling(r: Result) -> Sequence[str]:
    at_verdict = {row["name"].split(",")[0]: row["at_verdict"] for row in r["rows"]}
    model = f"{r['model']}, dummy weights" if r["dummy_weights"] else r["model"]
    share = f"{r['p_attn']:.3f} ({r['p_attn_min']:.3f} to {r['p_attn_max']:.3f})"
    figures = (f"{at_verdict[name]:.2f}" if name in at_verdict else "-" for name in _SHOWN_PROJECTIONS)
    verdicts = {"open" if is_open(share) else "**closed**" for share in (r["p_attn_min"], r["p_attn_max"])}
    verdict = verdicts.pop() if len(verdicts) == 1 else "unclear"
    return model, f"{r['context_tokens']:,}", where(r), share, f"{r['read_gb_per_s']:.1f}", *figures, verdict


def _oracle(result: Result, ceilings: Sequence[Result]) -> str:
    head = ("selector", "implementation verdict", "steps within bounds", "tokens kept", "K, V read", "logit MSE worst", "top-10 worst",
            "tokens changed", "output L2 worst", "KL mean")  # fmt: skip
    steps = f"{result['steps']} steps after each of {', '.join(result['texts'])}, on {device(result)}"
    title = f"### {result['model']}, {result['context_tokens']:,} tokens, {steps}"
    here, decisions = ceilings_of(result, ceilings), decide(result, ceilings)
    speeds = "No ceiling is measured on this target."
    if decisions:
        speeds = _table(("speed with", *map(where, here), "conclusion"), map(_decision, decisions))
    return f"{title}\n\n{_table(head, map(_selector, result['selectors']))}\n\n{speeds}"


def _selector(s: dict[str, Any]) -> Sequence[str]:
    return (
        f"`{s['selector']}`", f"**{PASS}**" if s["implementation_verdict"] == PASS else s["implementation_verdict"],
        f"{s['rows_within_bounds']}/{s['rows']}", f"{s['kept_fraction']:.3f}", f"{s['read_fraction']:.3f}", _shown(s["mse_max"], ".3f"),
        f"{s['topk_min']:.1f}", f"{s['argmax_changed']}/{s['argmax_judged']}", f"{s['rel_l2_max']:.3f}", _shown(s["kl_mean"], ".5f"),
    )  # fmt: skip


def _decision(d: Decision) -> Sequence[str]:
    conclusion = d.conclusion if d.conclusion == CLOSED else f"**{d.conclusion}**"
    return f"`{d.selector}`", *(f"{speed:.2f}" for speed in d.speeds), conclusion


def _shown(value: float | None, style: str) -> str:
    """Figures that are not finite are null in JSON."""
    return "inf" if value is None else f"{value:{style}}"


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
