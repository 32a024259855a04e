"""`sgl-hq oracle`: would the answers survive if attention read fewer tokens?"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from sgl_hq.lab.oracle_rows import PASS, StepRow, summarize_selector
from sgl_hq.launch.lab_run import CLOSED, MEASURED, check_folder, model_or_demo, progress, show, write_result

DEFAULT_SELECTORS = (
    "global_block_mass:f=0.25:b=64,global_block_mass:f=0.5:b=64,global_block_mass:f=0.25:b=16,"
    "recent_sink:sink=4:recent=1024,quest:f=0.25:b=16:dense=2,quest:f=0.25:b=16:first=1,quest:f=0.5:b=16:first=1"
)
_WITHIN, _BROKEN = "·", "x"


def run(
    model: str | None,
    context: int,
    steps: int,
    selectors: str = DEFAULT_SELECTORS,
    windows: list[Path] | None = None,
    device: str = "cpu",
    json_path: Path | None = None,
) -> int:
    """Returns MEASURED if at least one selector passes at every step of every text, else CLOSED. Raises LabError,
    GateError or DemoModelError."""
    from sgl_hq.gate.run import load_model
    from sgl_hq.lab.model_facts import check_context, device_facts
    from sgl_hq.lab.oracle import measure_text, text_cost
    from sgl_hq.lab.selectors import parse_selectors
    from sgl_hq.lab.texts import lab_texts

    chosen, texts = parse_selectors(selectors), lab_texts(windows)
    check_folder(json_path, "--json")
    began, rows = time.monotonic(), []
    with progress(len(texts) * text_cost(len(chosen))) as (say, advance):
        loaded = load_model(model_or_demo(model), device)
        check_context(loaded.model, context + steps)
        ids = [text.token_ids(loaded.tokenizer, context + steps + 1) for text in texts]
        for text, of_text in zip(texts, ids, strict=True):
            say(text.name)
            rows += measure_text(loaded.model, text.name, of_text, context, chosen, advance)
    name = Path(loaded.model.config._name_or_path).name
    by_selector = {s.name: [row for row in rows if row.selector == s.name] for s in chosen}
    summaries = [{"oracle": s.oracle} | summarize_selector(by_selector[s.name]) for s in chosen]
    title = f"{name}: {context:,} tokens, {steps} steps after each of {', '.join(text.name for text in texts)}"
    show(title, _table(summaries), _sentences(summaries, by_selector))
    facts = {"model": name, "context_tokens": context, "steps": steps, "texts": [t.name for t in texts]} | device_facts(loaded.model.device)
    found = [_row(row) for row in rows]
    write_result("oracle", facts | {"selectors": [_finite(s) for s in summaries], "rows": found}, began, json_path)
    return MEASURED if any(s["implementation_verdict"] == PASS for s in summaries) else CLOSED


def _row(row: StepRow) -> dict[str, Any]:
    """Rounded to six digits; figures that are not finite are null. `within_bounds` is of this step alone."""
    values = {key: float(f"{v:.6g}") if isinstance(v, float) else v for key, v in asdict(row).items()}
    return _finite(values) | {"within_bounds": row.keeps_bounds}


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}


def _table(summaries: Sequence[dict[str, Any]]) -> Table:
    out = Table(box=box.SIMPLE_HEAD)
    out.add_column("selector", no_wrap=True)
    out.add_column("implementation\nverdict")
    for column in (
        "steps within\nbounds", "tokens\nkept", "K, V\nread", "logit MSE\nworst", "top-10\nworst", "tokens\nchanged",
        "output L2\nworst", "KL\nmean",
    ):  # fmt: skip
        out.add_column(column, justify="right")
    for s in summaries:
        colour = "green" if s["implementation_verdict"] == PASS else "red"
        out.add_row(
            s["selector"], f"[{colour}]{s['implementation_verdict']}[/]", f"{s['rows_within_bounds']}/{s['rows']}",
            f"{s['kept_fraction']:.3f}", f"{s['read_fraction']:.3f}", f"{s['mse_max']:.3f}", f"{s['topk_min']:.1f}",
            f"{s['argmax_changed']}/{s['argmax_judged']}", f"{s['rel_l2_max']:.3f}", f"{s['kl_mean']:.5f}",
        )  # fmt: skip
    return out


def _sentences(summaries: Sequence[dict[str, Any]], by_selector: dict[str, list[StepRow]]) -> list[str]:
    """Every step of every selector, and what follows."""
    lines = [f"Steps, text after text: {_WITHIN} within the gate's bounds, {_BROKEN} not. A step within bounds is no pass of its selector."]
    width = max(map(len, by_selector))
    for name, rows in by_selector.items():
        texts = dict.fromkeys(row.text for row in rows)
        marks = ("".join(_WITHIN if row.keeps_bounds else _BROKEN for row in rows if row.text == text) for text in texts)
        lines.append(f"  {name:{width}}  {'  '.join(marks)}")
    passed = [s for s in summaries if s["implementation_verdict"] == PASS]
    if not passed:
        return [*lines, "Closed: no selector keeps every bound at every step of this target."]
    oracles, others = ([s["selector"] for s in passed if s["oracle"] is kind] for kind in (True, False))
    if oracles:
        lines.append(f"Kept every bound at every step, but needs the true attention, so is a bound and cannot be built: {', '.join(oracles)}.")
    if others:
        lines.append(f"Kept every bound at every step: {', '.join(others)}. Worth building only if its ceiling is, too: sgl-hq ceiling.")
    return lines
