"""`sgl-hq frontier`: bits against quality, every format on one model."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from sgl_hq.calibration.store import calibration_path
from sgl_hq.gate.model_digest import model_digest
from sgl_hq.gate.windows import CORE, shipped_windows, windows_of_files
from sgl_hq.lab.errors import LabError
from sgl_hq.launch.lab_run import MEASURED, check_folder, model_or_demo, progress, show, write_result
from sgl_hq.page_format import FORMATS, calibrated_bits

PREFIX_TOKENS, STEPS = (512,), 32
_REFERENCE_DIMS = 64  # the reference formats divide a head into runs of so many channels (sgl_hq/baselines/side.py)
PANELS = (("mse_max", "log"), ("kl_mean", "log"), ("output_cos_mean", "linear"), ("score_cos_mean", "linear"))
_COLUMNS = (
    ("stored\nbits", "stored_bits", ".3f"), ("effective\nbits", "effective_bits", ".3f"), ("output\ncosine", "output_cos_mean", ".6f"),
    ("\nworst", "output_cos_min", ".4f"), ("score\ncosine", "score_cos_mean", ".6f"), ("\nworst", "score_cos_min", ".4f"),
    ("logit MSE\nworst", "mse_max", ".3f"), ("\nmean", "mse_mean", ".4f"), ("top-10\nworst", "topk_min", ".1f"),
    ("token\nequal", "argmax_equal", ".3f"), ("output L2\nworst", "rel_l2_max", ".3f"), ("KL\nmean", "kl_mean", ".5f"),
)  # fmt: skip


def run(
    model: str | None,
    formats: Sequence[str] = (),
    prefixes: Sequence[int] = PREFIX_TOKENS,
    steps: int = STEPS,
    windows: list[Path] | None = None,
    device: str = "cpu",
    plot: Path | None = None,
    json_path: Path | None = None,
) -> int:
    """formats: page, calibrated or reference formats; none means every page format and, if head_dim allows, every reference
    format. Returns MEASURED. Raises LabError, GateError, CalibrationError, ModelDigestError or DemoModelError."""
    from sgl_hq.baselines import BASELINES
    from sgl_hq.gate.codecs import codec_of
    from sgl_hq.gate.run import check_sizes, load_model
    from sgl_hq.lab.frontier import frontier_cost, frontier_rows, pareto
    from sgl_hq.lab.model_facts import device_facts, head_dim

    check_sizes(prefixes, steps)
    check_folder(json_path, "--json")
    check_folder(plot, "--plot")
    if plot is not None:
        _check_matplotlib()
    model = model_or_demo(model)
    names = tuple(dict.fromkeys(formats)) or (*FORMATS, *BASELINES)
    needs_calibration = any(calibrated_bits(name) is not None for name in names)
    calibration = calibration_path(model_digest(model)) if needs_calibration else None
    codecs = [codec_of(name, calibration, device) for name in names]
    texts = windows_of_files(windows) if windows else shipped_windows(CORE)
    began = time.monotonic()
    cost = frontier_cost(len(texts), len(prefixes), len(codecs))
    with progress(cost) as (say, advance):
        loaded = load_model(model, device)
        if head_dim(loaded.model) % _REFERENCE_DIMS:
            _refuse_references(formats, head_dim(loaded.model))
            codecs = [codec for codec in codecs if codec.name not in BASELINES]
        rows = frontier_rows(loaded, texts, prefixes, steps, codecs, say, advance)
    show(f"{Path(model).name}: {len(texts)} texts, prefixes {', '.join(map(str, prefixes))}, {steps} steps", _table(rows), [
        f"Smaller formats are worse in logit MSE along: {' '.join(pareto(rows, 'mse_mean'))}.",
        f"The same for the score cosine: {' '.join(pareto(rows, 'score_cos_mean', larger_is_better=True))}.",
        "Trials within bounds here admit nothing to a server: that takes sgl-hq gate.",
    ])  # fmt: skip
    facts = {"model": Path(model).name, "prefixes": list(prefixes), "steps": steps, "texts": [t.name for t in texts]}
    facts |= device_facts(loaded.model.device)
    write_result("frontier", facts | {"rows": [_short(row) for row in rows]}, began, json_path)
    if plot is not None:
        from sgl_hq.launch.quality_report import plot as draw

        draw(Path(model).name, rows, plot, PANELS)
    return MEASURED


def _refuse_references(formats: Sequence[str], dim: int) -> None:
    from sgl_hq.baselines import BASELINES

    references = [name for name in formats if name in BASELINES]
    if references:
        raise LabError(f"{', '.join(references)} take a head_dim that is a multiple of {_REFERENCE_DIMS}, this model's is {dim}: give page formats")


def _check_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise LabError("--plot needs matplotlib, which is not installed: pip install matplotlib, or leave out --plot")


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    out.add_column("format", no_wrap=True)
    out.add_column("trials\nin bounds", justify="right")
    for label, _, _ in _COLUMNS:
        out.add_column(label, justify="right", no_wrap=True)
    for row in rows:
        out.add_row(row["format"], f"{row['strict_trials']}/{row['trials']}", *(f"{row[key]:{style}}" for _, key, style in _COLUMNS))
    return out


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """Six digits; figures that are not finite are null."""
    return {
        key: (float(f"{value:.6g}") if math.isfinite(value) else None) if isinstance(value, float) else value
        for key, value in row.items()
    }
