"""What `sgl-hq bench kernels` prints: the machine once, then a table for each case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from sgl_hq.kernels.grouped_attention.bench_cases import Case

_TITLES = ("", "us", "p10", "p90", "MB", "GFLOP", "floor us", "of floor", "vs FlashInfer", "goal", "", "error")


def headings(facts: dict[str, Any]) -> str:
    """What every figure below rests on."""
    from sgl_hq.kernels.grouped_attention.bench_cases import BF16_TFLOP_S, READ_TB_S

    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return (
        f"{facts['machine']['gpu']}; commit {facts['commit']}; {versions}\n"
        "Microseconds of one layer: CUDA graphs over several layers of other values, cold L2, median and deciles of replays.\n"
        f"MB: what must move, every stored token once, queries and outputs; floor: the slower of MB at {READ_TB_S} TB/s and "
        f"GFLOP at {BF16_TFLOP_S:.0f} TFLOP/s (H200).\n"
        "FlashInfer: batch decode, fa2, tensor cores, pages of one token, as SGLang plans it; cascade: 2 levels, pages of 64; "
        "fa3: pages of one token; triton: up to 8 splits.\n"
        "Ours: grouped kernels over packed prefixes, a dense one over private tokens, one merge; the parts run alone below it.\n"
        "error: root mean square against float64, as a share of what differs between rows."
    )


def show_case(case: Case, rows: Sequence[dict[str, Any]]) -> None:
    """One line a row; the parts of ours are indented. Never cut, also where stdout is a file."""
    shared = "one prefix" if case.prefixes == 1 else f"{case.prefixes} prefixes"
    table = Table(
        *_TITLES,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title=f"{case.name}: {case.requests} requests, {shared} of {case.prefix_tokens:,}, {case.private_tokens} private tokens each; "
        f"{case.q_heads} query heads, {case.kv_heads} kv heads, head_dim {case.head_dim}",
    )
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for row in rows:
        table.add_row(*line(row))
    console = Console()
    Console(width=max(console.width, Console(width=1000).measure(table).maximum)).print(table)
    for row in rows:
        if row["failure"]:
            print(f"{row['arm']}: {'not measured' if row['skipped'] else 'FAILED'}: {row['failure']}")


def line(row: dict[str, Any]) -> list[str]:
    """The cells of one row; why a row has no time is said below the table."""
    name = row["arm"] if row["part"] == "total" else f"  {row['part']}"
    if row["us_median"] is None:
        return [name, "-"]
    goal = "" if row["goal_us"] is None else f"<= {row['goal_us']:.0f}"
    return [
        name,
        *(f"{row[key]:.1f}" for key in ("us_median", "us_p10", "us_p90")),
        _scaled(row["bytes"], 1e6),
        _scaled(row["flops"], 1e9),
        _scaled(row["floor_us"], 1),
        "" if row["of_floor"] is None else f"{row['of_floor']:.0%}",
        "" if row["speed_up"] is None else f"{row['speed_up']:.2f}x",
        goal,
        "" if row["verdict"] == "-" else row["verdict"],
        "" if row["part"] != "total" or row["error"] is None else f"{row['error']:.3f}",
    ]


def _scaled(value: float | None, unit: float) -> str:
    return "" if value is None else f"{value / unit:.1f}"
