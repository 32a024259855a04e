"""`sgl-hq bench kernels`: one layer's decode attention, ours beside the kernels people use today, in one run on one GPU.

Sizes, floors and goals: kernels/grouped_attention/bench_cases.py. Inputs, our arm, check and timing: bench.py there.
An arm whose output is wrong gets no time.
"""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_hq.launch.bench_facts import BenchError, bench_facts, check_json_path, write_rows
from sgl_hq.launch.bench_kernels_report import headings, show_case
from sgl_hq.launch.bench_progress import Steps
from sgl_hq.launch.signals import terminated_like_interrupted
from sgl_hq.page_format import PageFormat, get_format

if TYPE_CHECKING:
    import torch

    from sgl_hq.kernels.grouped_attention.bench import Call, Layer, Tables
    from sgl_hq.kernels.grouped_attention.bench_cases import Case

Row = dict[str, Any]

FORMATS = "bf16,lossless,int8,hq6,hq5,hq4,hq3,hq2"
QUICK = {"cases": "A,C", "formats": "bf16,hq4", "replays": 10}
REPLAYS = 50


def run(
    cases: str | None = None,
    formats: str | None = None,
    json_path: Path | None = None,
    quick: bool = False,
    commit: str | None = None,
) -> int:
    """Measure, print a table for each case, write `json_path`. Returns 0, or 1 when an arm was wrong or broke.

    formats: comma-separated; an empty string measures the baselines only. Raises BenchError for what cannot be run.
    """
    import torch

    from sgl_hq.kernels.grouped_attention.bench_cases import parse_cases

    try:
        chosen = parse_cases(cases or (QUICK["cases"] if quick else "A,B,C,D"))
        default = QUICK["formats"] if quick else FORMATS
        page_formats = [get_format(name.strip()) for name in (default if formats is None else formats).split(",") if name.strip()]
    except ValueError as error:
        raise BenchError(str(error)) from error
    check_json_path(json_path)
    if not torch.cuda.is_available():
        raise BenchError("No CUDA device here: `sgl-hq bench kernels` needs one")
    facts = bench_facts(commit)
    print(headings(facts))
    rows: list[Row] = []
    try:
        with terminated_like_interrupted():
            _measure(chosen, page_formats, QUICK["replays"] if quick else REPLAYS, rows)
    finally:
        if json_path is not None:
            write_rows(rows, facts, json_path)
    return int(any(row["failure"] and not row["skipped"] for row in rows))


def _measure(cases: Sequence[Case], formats: Sequence[PageFormat], replays: int, rows: list[Row]) -> None:
    from sgl_hq.launch.bench_baselines import BASELINES

    steps = Steps(len(cases) * (len(BASELINES) + len(formats)) + bool(formats))
    if formats:
        _compile_side_by_side(cases, formats)
        steps.done(f"compiled the kernels of {len(formats)} formats")
    for case in cases:
        start = len(rows)
        _measure_case(case, formats, replays, rows, steps)
        show_case(case, rows[start:])


def _measure_case(case: Case, formats: Sequence[PageFormat], replays: int, rows: list[Row], steps: Steps) -> None:
    import torch

    from sgl_hq.kernels.grouped_attention.bench import Tables, error_of, layers_of
    from sgl_hq.launch.bench_baselines import BASELINES, REFERENCE, NotHere

    tables = Tables.scattered(case)
    layers = layers_of(tables)
    vanilla: torch.Tensor | None = None
    for name, build in BASELINES.items():
        row = new_row(case, name, len(layers))
        rows.append(row)
        try:
            arm = build(tables, layers)
            arm.calls[0]()
            accept(row, error_of(tables, arm.layers[0], arm.outs[0]))
            vanilla = arm.outs[0].clone() if name == REFERENCE else vanilla
            moved, tokens = case.dense_bytes(arm.value_bytes), case.prefix_tokens + case.private_tokens
            fill(row, rows, _times(arm.calls, replays), moved, case.flops(tokens))
        except NotHere as missing:
            row |= {"failure": str(missing), "skipped": True}
        except Exception as error:
            _broke(row, error)
        arm = None  # its outputs and copies of the cache
        torch.cuda.empty_cache()
        steps.done(f"case {case.name}: {name}")
    for fmt in formats:
        _measure_format(case, fmt, tables, layers, vanilla, replays, rows)
        torch.cuda.empty_cache()
        steps.done(f"case {case.name}: ours, {fmt.name}")


def _measure_format(
    case: Case, fmt: PageFormat, tables: Tables, layers: Sequence[Layer], vanilla: torch.Tensor | None, replays: int,
    rows: list[Row],
) -> None:  # fmt: skip
    from sgl_hq.kernels.grouped_attention.bench import Grouped

    layout = fmt.layout(case.head_dim)
    total = new_row(case, f"ours {fmt.name}", len(layers), fmt.name)
    rows.append(total)
    try:
        arm = Grouped(tables, layers, layout)
        accept(total, arm.error())
        if vanilla is not None and not fmt.lossy:
            total["largest_difference_to_flashinfer"] = float((arm.outs[0].view_as(vanilla) - vanilla).abs().max())
        parts = arm.parts()
        flops = {"total": case.flops(case.prefix_tokens + case.private_tokens), "packed": case.flops(case.prefix_tokens)}
        moved = {"total": case.packed_bytes(layout), "packed": case.record_bytes(layout) + case.io_bytes // 2}
        flops["dense"], moved["dense"] = case.flops(case.private_tokens), case.private_bytes + case.io_bytes
        for part, calls in parts.items():
            row = total if part == "total" else new_row(case, total["arm"], len(layers), fmt.name, part)
            if row is not total:
                row["error"] = total["error"]
                rows.append(row)
            fill(row, rows, _times(calls, replays), moved.get(part), flops.get(part))
    except Exception as error:
        _broke(total, error)


def new_row(case: Case, arm: str, layers: int, fmt: str | None = None, part: str = "total") -> Row:
    """A row without a time: microseconds a layer, bytes, floating-point operations."""
    return {
        "case": case.name,
        "arm": arm,
        "format": fmt,
        "part": part,
        "layers": layers,
        "requests": case.requests,
        "prefixes": case.prefixes,
        "prefix_tokens": case.prefix_tokens,
        "private_tokens": case.private_tokens,
        "us_median": None, "us_p10": None, "us_p90": None,
        "bytes": None, "flops": None, "floor_us": None, "of_floor": None,
        "speed_up": None, "goal_us": None, "stretch_us": None, "verdict": "-",
        "error": None, "largest_difference_to_flashinfer": None, "failure": None, "skipped": False,
    }  # fmt: skip


def accept(row: Row, error: float) -> None:
    """Note the error; raises WrongResult when it is not below the tolerance (a NaN is not)."""
    from sgl_hq.kernels.grouped_attention.bench import TOLERANCE

    row["error"] = error if math.isfinite(error) else None
    if not error <= TOLERANCE:
        raise WrongResult(f"wrong result: error {error:.3g}, allowed {TOLERANCE}")


class WrongResult(RuntimeError):
    """An arm computed something else than attention; it gets no time."""


def fill(row: Row, rows: Sequence[Row], times: Any, moved: int | None, flops: int | None) -> None:
    """Times, floor and ratio of a row; goals of our total."""
    from sgl_hq.kernels.grouped_attention.bench_cases import floor_us, goal_us, verdict
    from sgl_hq.launch.bench_baselines import REFERENCE

    row |= {"us_median": times.median, "us_p10": times.p10, "us_p90": times.p90, "bytes": moved, "flops": flops}
    if moved is not None and flops is not None:
        row["floor_us"] = floor_us(moved, flops)
        row["of_floor"] = row["floor_us"] / times.median
    if row["part"] != "total":
        return
    reference = next((r for r in rows if r["case"] == row["case"] and r["arm"] == REFERENCE), None)
    if reference and reference["us_median"]:
        row["speed_up"] = reference["us_median"] / times.median
    if row["format"] is not None:
        row["goal_us"], row["stretch_us"] = goal_us(row["case"], row["format"]) or (None, None)
        row["verdict"] = verdict(row["case"], row["format"], times.median)


def _times(calls: Sequence[Call], replays: int) -> Any:
    from sgl_hq.kernels.grouped_attention.bench import graph_times

    return graph_times(calls, replays)


def _broke(row: Row, error: Exception) -> None:
    """Keep the run going: a broken arm is a row with its reason, and the whole traceback is on stderr."""
    row["failure"] = f"{type(error).__name__}: {error}".splitlines()[0]
    print(f"case {row['case']}, {row['arm']}:", file=sys.stderr)
    traceback.print_exception(error)


def _compile_side_by_side(cases: Sequence[Case], formats: Sequence[PageFormat]) -> None:
    """Fill Triton's disk cache with one process for each format: a format compiles for tens of seconds on one core."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, wait

    with ProcessPoolExecutor(len(formats), multiprocessing.get_context("spawn")) as pool:
        wait([pool.submit(_compile, tuple(cases), fmt) for fmt in formats])  # who fails here fails again below, and is shown


def _compile(cases: Sequence[Case], fmt: PageFormat) -> None:
    import torch

    from sgl_hq.kernels.grouped_attention.bench import Grouped, Layer, Tables

    for case in cases:
        tables = Tables.scattered(case)
        arm = Grouped(tables, [Layer(tables, 0)], fmt.layout(case.head_dim))
        arm.parts()["total"][0]()
        torch.cuda.synchronize()
