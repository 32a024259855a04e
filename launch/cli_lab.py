"""The commands `sgl-hq ceiling`, `sgl-hq oracle` and `sgl-hq frontier`: what is worth building, and what is closed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

lab = typer.Typer()

_MODEL = Annotated[Optional[str], typer.Option(help="Folder or hub name. Default: the demo model.")]
_DEVICE = Annotated[str, typer.Option(help="Where to compute: cpu or cuda.")]
_JSON = Annotated[Optional[Path], typer.Option("--json", help="Also write every row here, with commit, versions and machine.")]
_WINDOWS = Annotated[Optional[list[Path]], typer.Option(help="A text file of your own instead of ours; may be repeated.")]


@lab.command()
def ceiling(
    model: _MODEL = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens in the KV cache of every row.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Rows of the decode batch.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps to time.")] = 20,
    active: Annotated[Optional[str], typer.Option(help="Fractions f of attention's work, comma-separated.")] = None,
    overhead: Annotated[Optional[str], typer.Option(help="Costs h of a method in decode steps, comma-separated.")] = None,
    p_attn: Annotated[Optional[float], typer.Option(help="Share of a step in attention, from elsewhere: nothing is measured.")] = None,
    dummy_weights: Annotated[bool, typer.Option("--dummy-weights", help="Use only the model's shape: its config.json is enough.")] = False,
    device: _DEVICE = "cpu",
    json_path: _JSON = None,
) -> None:
    """How much faster could a decode step become if attention did less? Measures its share of a step, then projects.

    Exit code 0: attention is a large enough share. 3: measured, and everything is closed. Others: nothing was measured.

    Example: sgl-hq ceiling --model MODEL --context 8192 --batch 16
    """
    from sgl_hq.lab.projection import ACTIVE_FRACTIONS, OVERHEADS
    from sgl_hq.launch.ceiling import run

    actives = _numbers(active, "--active", float) or ACTIVE_FRACTIONS
    overheads = _numbers(overhead, "--overhead", float) or OVERHEADS
    raise typer.Exit(run(model, context, batch, steps, device, actives, overheads, p_attn, dummy_weights, json_path))


@lab.command()
def oracle(
    model: _MODEL = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens before the first step.")] = 2048,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps after each text.")] = 16,
    selector: Annotated[
        Optional[str],
        typer.Option(help="Comma-separated; global_block_mass:f=F:b=N, recent_sink:sink=N:recent=N, quest:f=F:b=N[:dense=LAYERS][:first=PAGES]."),
    ] = None,
    windows: _WINDOWS = None,
    device: _DEVICE = "cpu",
    json_path: _JSON = None,
) -> None:
    """Would the answers survive if attention read fewer tokens? Selectors act in the model, every step is judged.

    Exit code 0: a selector keeps every bound at every step. 3: none does. Others: no verdict.

    Example: sgl-hq oracle --model MODEL --context 8192 --selector global_block_mass:f=0.25:b=64
    """
    from sgl_hq.launch.oracle import DEFAULT_SELECTORS, run

    chosen = DEFAULT_SELECTORS if selector is None else selector
    raise typer.Exit(run(model, context, steps, chosen, windows, device, json_path))


@lab.command()
def frontier(
    model: _MODEL = None,
    formats: Annotated[
        Optional[str], typer.Option("--format", help="Comma-separated page, calibrated or reference formats. Default: all but calibrated.")
    ] = None,
    prefix: Annotated[Optional[str], typer.Option(help="Prefix lengths in tokens, comma-separated. Default: 512.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps after each prefix.")] = 32,
    windows: _WINDOWS = None,
    device: _DEVICE = "cpu",
    plot: Annotated[Optional[Path], typer.Option(help="Also draw four panels into this .svg file (needs matplotlib).")] = None,
    json_path: _JSON = None,
) -> None:
    """Bits against quality, every format on one model: score and output cosines beside the gate's logit figures.

    Example: sgl-hq frontier --model MODEL --format hq4,hq6,kivi4 --plot frontier.svg
    """
    from sgl_hq.launch.frontier import PREFIX_TOKENS, run

    names = [name.strip() for name in formats.split(",") if name.strip()] if formats else []
    prefixes = _numbers(prefix, "--prefix", int) or PREFIX_TOKENS
    raise typer.Exit(run(model, names, prefixes, steps, windows, device, plot, json_path))


def _numbers(text: str | None, option: str, kind: type) -> list:
    """Empty if the option is not given."""
    try:
        return [kind(n) for n in text.split(",")] if text else []
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of numbers", param_hint=option) from None
