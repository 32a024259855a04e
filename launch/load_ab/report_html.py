"""A result as one self-contained HTML page: facts, how bytes were made equal, scorecards, plots, what each figure is.

No script, no network: style and plots are inline. Needs the extra `plots`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sgl_hq.launch.load_ab.report_cells import CARDS, LEGEND, budget_line, cell, load_line
from sgl_hq.launch.load_ab.report_losses import loss_sentences
from sgl_hq.launch.load_ab.result_view import ReportError, ResultView

try:
    import jinja2

    from sgl_hq.launch.load_ab import report_plots
except ImportError as error:
    library = (error.name or "a library").partition(".")[0]
    raise ReportError(f"{library} is not installed, which --html needs: pip install 'sgl-hq[plots]'") from error


def write_html(result: dict[str, Any], path: Path) -> None:
    """Raises OSError where `path` cannot be written."""
    path.write_text(page(result), encoding="utf-8")


def page(result: dict[str, Any]) -> str:
    """The page's text."""
    view = ResultView(result)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        view=view,
        result=result,
        facts=_facts(result),
        budget=budget_line(view),
        legend=LEGEND.format(reference=view.arms[0]),
        losses=loss_sentences(view),
        cards=CARDS,
        cell=cell,
        load_line=load_line,
        sections=report_plots.sections(view),
        definitions=_definitions(result),
    )


def _facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of all that the run states about itself, nested values by a dotted name."""
    return [*_flat("", result["facts"]), *((f"plan: {name}", value) for name, value in _flat("", _plan_values(result["plan"])))]


def _plan_values(plan: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in plan.items() if value is not None and name not in ("arms", "workloads")}


def _flat(prefix: str, values: dict[str, Any]) -> list[tuple[str, str]]:
    found = []
    for name, value in values.items():
        found += _flat(f"{prefix}{name}.", value) if isinstance(value, dict) else [(prefix + name, str(value))]
    return found


def _definitions(result: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(figure, unit, quantity, source) of every figure in the rows. The harness refuses rows that disagree on them."""
    found = {}
    for run in result["runs"]:
        for name, figure in run["figures"].items():
            found.setdefault(name, (name, figure["unit"], figure["quantity"], figure["source"]))
    return list(found.values())
