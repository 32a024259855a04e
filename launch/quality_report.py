"""docs/quality.md from result files: `python -m sgl_hq.launch.quality_report docs` (needs the extra `plots`).

    docs/results/*.json       what `sgl-hq gate --json` wrote, any number of files a model
    docs/quality.in.md        the prose; {{frontier}}, {{tables}} and {{published}} stand for what is made here
    docs/quality.md, *.svg    written

No figure of a format is typed by hand.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sgl_hq.gate.bounds import BOUNDS

Row = dict[str, Any]
_PUBLISHED = {  # effective bits as published, at T tokens and head_dim d (sgl_hq/baselines: where they come from)
    "sink1_channelwise_four_level_2bit": (2.162, 185, 64),
    "hadamard_affine_four_level_2bit_g64_meta8": (2.255, 185, 64),
    "hadamard_affine_four_level_2bit_g32": (3.0, 185, 64),
    "affine_seven_level_3bit_g64_meta4": (3.130, 185, 64),
    "affine_seven_level_3bit_g32": (4.0, 185, 64),
}
_COLUMNS = (
    ("stored bits", "stored_bits", ".3f"), ("effective", "effective_bits", ".3f"), ("MSE worst", "mse_max", ".3f"),
    ("mean", "mse_mean", ".4f"), ("worst, shift removed", "variance_mse_max", ".3f"), ("top-10 worst", "topk_min", ".1f"),
    ("token equal, judged", "argmax_equal", ".4f"), ("output L2 worst", "rel_l2_max", ".3f"), ("KL mean", "kl_mean", ".5f"),
    ("perplexity %", "ppl_change_percent", "+.2f"),
)  # fmt: skip
_PANELS = (("mse_max", "log"), ("topk_min", "linear"), ("rel_l2_max", "log"), ("kl_mean", "log"))


def write(docs: Path) -> None:
    """Raises FileNotFoundError without results or prose."""
    models = _rows_by_model(docs / "results")
    plots = {model: f"frontier-{model}.svg" for model in models}
    for model, name in plots.items():
        plot(model, models[model], docs / name, _PANELS)
    parts = {
        "frontier": "\n\n".join(f"![{model}: stored bits against four figures]({name})" for model, name in plots.items()),
        "tables": "\n\n".join(_table(model, rows) for model, rows in models.items()),
        "published": _published(),
    }
    text = (docs / "quality.in.md").read_text()
    for name, part in parts.items():
        text = text.replace("{{" + name + "}}", part)
    (docs / "quality.md").write_text(text)


def _rows_by_model(results: Path) -> dict[str, list[Row]]:
    """Rows of every format, smallest first. A format measured twice: the run of the later date counts."""
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    written = [json.loads(path.read_text()) for path in results.glob("*.json")]
    gates = [result for result in written if isinstance(result, dict) and "gate_version" in result]  # others are benchmarks
    for result in sorted(gates, key=lambda r: r["date"]):
        for row in result.get("formats", [result]):
            found[Path(result["model"]).name][row["format"]] = row
    if not found:
        raise FileNotFoundError(f"no results in {results}: write them with `sgl-hq gate --json FILE`")
    return {model: sorted(rows.values(), key=lambda r: r["stored_bits"]) for model, rows in sorted(found.items())}


def _table(model: str, rows: list[Row]) -> str:
    trials = {(row["trials"], row["steps"]) for row in rows}
    sizes = ", ".join(f"{t} trials of {s // t} steps" for t, s in sorted(trials))
    head = ["format", "verdict", "strict trials", *(label for label, _, _ in _COLUMNS)]
    lines = [f"### {model}", "", f"{sizes} a format.", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        verdict = "**pass**" if row["verdict"] == "pass" else "fail"
        cells = [f"`{row['format']}`", verdict, f"{row['strict_trials']}/{row['trials']}"]
        cells += [_shown(row, key, style) for _, key, style in _COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(row: Row, key: str, style: str) -> str:
    """Bold where the figure breaks a bound of the gate; infinite figures are null in JSON."""
    if row[key] is None:
        return "**inf**"
    broken = any(bound.figure == key and not bound.holds(row[key]) for bound in BOUNDS)
    return f"**{row[key]:{style}}**" if broken else f"{row[key]:{style}}"


def plot(model: str, rows: Sequence[Row], path: Path, panels: Sequence[tuple[str, str]]) -> None:
    """Four figures against stored bits as an SVG file. panels: (key of a row, `log` or `linear`)."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sgl_hq"  # the same rows give the same file
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for axes, (key, scale) in zip(grid.flat, panels, strict=True):
        for kind, verdict, marker in _groups(rows):
            points = [r for r in rows if _kind(r) == kind and r["verdict"] == verdict and r[key] is not None]
            x, y = [r["stored_bits"] for r in points], [r[key] for r in points]
            axes.scatter(x, y, marker=marker, label=f"{kind}, {verdict}", s=28, color=_COLOURS[kind], alpha=0.5 + 0.5 * (verdict == "pass"))
        for bound in BOUNDS:
            if bound.figure == key:
                axes.axhline(bound.limit, linestyle=":", color="black", linewidth=1)
        axes.set(xlabel="stored bits per value", ylabel=key, yscale=scale)
    grid.flat[0].legend(fontsize=7)
    figure.suptitle(f"{model} (dotted: the gate's bound)")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


_COLOURS = {"calibrated": "tab:red", "served": "tab:blue", "reference": "tab:gray"}


def _groups(rows: Sequence[Row]) -> Iterator[tuple[str, str, str]]:
    for kind in _COLOURS:
        for verdict, marker in (("fail", "x"), ("pass", "o")):
            if any(_kind(row) == kind and row["verdict"] == verdict for row in rows):
                yield kind, verdict, marker


def _kind(row: Row) -> str:
    from sgl_hq.baselines import BASELINES
    from sgl_hq.page_format import calibrated_bits

    if row["format"] in BASELINES:
        return "reference"
    return "served" if calibrated_bits(row["format"]) is None else "calibrated"


def _published() -> str:
    from sgl_hq.baselines import BASELINES

    lines = ["| format | published | here | at |", "|---|---|---|---|"]
    for name, (published, tokens, dim) in _PUBLISHED.items():
        ours = BASELINES[name]().effective_bits_per_dim(dim, dim, tokens)
        lines.append(f"| `{name}` | {published:.3f} | {ours:.6f} | {tokens} tokens, head_dim {dim} |")
    return "\n".join(lines)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
