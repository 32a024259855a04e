"""The page's plots, what each one shows: requests/s against the working set, TTFT, KV bytes over time, quality, gain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from sgl_hq.launch.load_ab.plot_svg import COLOURS, INK, Plot, style, svg_plot
from sgl_hq.launch.load_ab.result_view import Case, ResultView, Row


@dataclass(frozen=True)
class Section:
    """Plots of one question; without plots, `missing` says why."""

    heading: str
    plots: tuple[Plot, ...]
    missing: str


def sections(view: ResultView) -> list[Section]:
    """All plots of a result, in the order of the page."""
    return [
        Section(
            "Requests a second against the working set", _throughput_plots(view),
            "Not drawn: this needs two workloads of kind shared with different working sets (working_set, or prefixes beside kv_tokens).",
        ),
        Section("Time to first token", _each_case(view, _first_token), "Not drawn: no arm was measured."),
        Section("KV bytes in use over time", _each_case(view, _bytes_over_time), "Not drawn: no arm was measured."),
        Section(
            "Quality against bits", _each_case(view, _quality),
            "Not drawn: no workload of this plan has right answers to count (`fewshot` has).",
        ),
        Section("Modelled and measured gain", _each_case(view, _gain), "Not drawn: no arm held packed pages."),
    ]  # fmt: skip


def working_sets(view: ResultView) -> dict[str, float]:
    """Workload of kind shared -> its distinct prompt tokens in units of the KV budget's bf16 tokens; those that the plan states."""
    found = {}
    plan = view.result["plan"]
    for spec in plan["workloads"]:
        if spec["kind"] != "shared" or spec["name"] not in view.workloads:
            continue
        if spec.get("working_set"):
            found[spec["name"]] = spec["working_set"]
        elif spec.get("prefixes") and plan.get("kv_tokens"):
            found[spec["name"]] = spec["prefixes"] * spec["context"] / plan["kv_tokens"]
    return found


def _throughput_plots(view: ResultView) -> tuple[Plot, ...]:
    sizes = working_sets(view)
    if len(set(sizes.values())) < 2:
        return ()
    phases = dict.fromkeys(phase for workload, phase in view.cases if workload in sizes)
    return tuple(plot for phase in phases if (plot := _throughput(view, phase, sizes)))


def _throughput(view: ResultView, phase: str, sizes: dict[str, float]) -> Plot | None:
    lines = {}
    for arm in view.arms:
        points = [(size, figure) for name, size in sizes.items() if (figure := view.figure(arm, (name, phase), "requests_s"))]
        if points:
            lines[arm] = tuple(zip(*sorted(points, key=lambda point: point[0])))

    def draw(axes: Axes) -> None:
        for arm, (x, figures) in lines.items():
            _interval_line(axes, view, arm, x, figures)
        axes.axvline(1, color=INK, linestyle=":", linewidth=1, label="bf16 capacity")
        axes.set(xlabel="distinct prompt tokens / bf16 tokens that the budget holds", ylabel="requests/s", xlim=(0, None), ylim=(0, None))

    return svg_plot(f"{phase}: requests/s against working set", "One line for each arm, 95 % intervals.", draw) if lines else None


def _each_case(view: ResultView, make: Callable[[ResultView, Case], Plot | None]) -> tuple[Plot, ...]:
    return tuple(plot for case in view.cases if (plot := make(view, case)))


def _first_token(view: ResultView, case: Case) -> Plot | None:
    times = {arm: np.sort(np.concatenate([run["per_request"]["ttft_ms"] for run in view.runs(arm, case)])) for arm in _measured(view, case)}

    def draw(axes: Axes) -> None:
        for arm, values in times.items():
            colour, dashes, _ = style(view.arms.index(arm))
            axes.step(values, np.arange(1, len(values) + 1) / len(values), where="post", label=arm, color=colour, linestyle=dashes)
        axes.set(xlabel="time to first token, ms", ylabel="share of requests", xscale="log", ylim=(0, 1.02))
        axes.xaxis.set_major_formatter("{x:,g}")

    text = "Cumulative share of the requests of all repeats against their time to first token, one line for each arm."
    return svg_plot(f"{', '.join(case)}: TTFT of all requests", text, draw) if times else None


def _bytes_over_time(view: ResultView, case: Case) -> Plot | None:
    series = {arm: view.runs(arm, case)[0]["series"] for arm in _measured(view, case)}

    def draw(axes: Axes) -> None:
        for arm, samples in series.items():
            colour, dashes, _ = style(view.arms.index(arm))
            axes.plot(samples["t_s"], np.array(samples["kv_bytes_used"]) / 1e6, label=arm, color=colour, linestyle=dashes)
        axes.axhline(view.result["equal_bytes"]["budget_bytes"] / 1e6, color=INK, linestyle=":", linewidth=1, label="budget")
        axes.set(xlabel="seconds since the phase began", ylabel="KV in use, MB", ylim=(0, None), xlim=(0, None))
        axes.yaxis.set_major_formatter("{x:,g}")

    text = "KV bytes in use against time in the first measured repeat, one line for each arm, and the budget of every arm."
    return svg_plot(f"{', '.join(case)}: KV bytes in use", text, draw) if series else None


def _quality(view: ResultView, case: Case) -> Plot | None:
    """Bits are what the server held, not what a format promises: 16 bf16 bits over the measured gain."""
    points = {}
    for arm in view.arms:
        score, gain = view.figure(arm, case, "task_score"), view.mean(arm, case, "measured_gain")
        if score and gain:
            points[arm] = (16 / gain, score)

    def draw(axes: Axes) -> None:
        for arm, (bits, score) in points.items():
            _interval_line(axes, view, arm, [bits], [score])
        axes.set(xlabel="KV bits held for each value, measured", ylabel="task score", xlim=(0, None), ylim=(0, 1))

    text = "Share of right answers against the bits held in the KV cache for each value, one point for each arm, 95 % intervals."
    return svg_plot(f"{', '.join(case)}: task score against bits", text, draw) if points else None


def _gain(view: ResultView, case: Case) -> Plot | None:
    gains = {}
    for arm in view.ours:
        modelled, measured = (view.mean(arm, case, name) for name in ("modelled_gain", "measured_gain"))
        if modelled and measured and view.mean(arm, case, "packed_fraction"):
            gains[arm] = (modelled, measured)

    def draw(axes: Axes) -> None:
        places = np.arange(len(gains))
        for offset, label, colour, values in zip((-0.2, 0.2), ("modelled", "measured"), (COLOURS[-3], COLOURS[-1]), zip(*gains.values())):
            bars = axes.bar(places + offset, values, 0.38, label=label, color=colour)
            axes.bar_label(bars, fmt="%.2f", padding=2)
        axes.set_xticks(places, list(gains))
        axes.grid(visible=False, axis="x")
        axes.set(ylabel="bf16 bytes / bytes used", ylim=(0, 1.15 * max(max(pair) for pair in gains.values())))

    text = "For each arm with packed pages: 1 / (p b / 16 + 1 - p) beside the bf16 bytes of the tokens held over the bytes used."
    return svg_plot(f"{', '.join(case)}: gain in KV bytes", text, draw) if gains else None


def _measured(view: ResultView, case: Case) -> list[str]:
    return [arm for arm in view.arms if view.runs(arm, case)]


def _interval_line(axes: Axes, view: ResultView, arm: str, x: Sequence[float], figures: Sequence[Row]) -> None:
    colour, dashes, marker = style(view.arms.index(arm))
    mean = [f["mean"] for f in figures]
    errors = [[abs(f["mean"] - f[end]) if f[end] is not None else 0 for f in figures] for end in ("low", "high")]
    axes.errorbar(x, mean, yerr=errors, label=arm, color=colour, linestyle=dashes, marker=marker, markersize=5, capsize=3)
