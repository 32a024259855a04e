"""The command `sgl-hq`. Every command imports what it needs inside, so that `--help` loads neither torch nor SGLang."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from sgl_hq import __version__
from sgl_hq.launch.cli_ab import ab
from sgl_hq.launch.cli_bench import bench
from sgl_hq.launch.cli_lab import lab
from sgl_hq.page_format import DEFAULT_LOSSY

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(
    help="SGLang with shared KV pages held packed. Start with: sgl-hq ab --quick",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(bench, name="bench")
app.command()(ab)
app.add_typer(lab)


def main() -> None:
    """Entry point of the console script.

    An error class of our own package states a reason and a remedy: the user sees that sentence and exit code 1.
    Anything else is a bug and keeps its traceback.
    """
    try:
        app()
    except Exception as error:
        if not type(error).__module__.startswith("sgl_hq."):
            raise
        print(f"sgl-hq: {error}", file=sys.stderr)
        sys.exit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


@app.command(context_settings=PASS_THROUGH)
def serve(context: typer.Context) -> None:
    """Start an SGLang server. All options go to SGLang; the --hq-* ones choose the format of the packed tier.

    Example: sgl-hq serve --model-path MODEL --hq-format hq7 --port 30000

    SGLang's own options: python -m sglang.launch_server --help
    """
    from sgl_hq.launch.serve import serve as start

    start(context.args)


@app.command()
def gate(
    model: Annotated[Optional[str], typer.Option(help="Folder or hub name. Default: the demo model.")] = None,
    formats: Annotated[
        Optional[str], typer.Option("--format", help=f"Comma-separated page or reference formats. Default: {DEFAULT_LOSSY}.")
    ] = None,
    all_presets: Annotated[
        bool, typer.Option("--all", help="All presets that lose bits; says which is the smallest that passes.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="5 of 13 texts, shorter prefixes: a first answer, no verdict for serving.")
    ] = False,
    prefix: Annotated[
        Optional[str], typer.Option(help="Prefix lengths in tokens, comma-separated. Default: 512,1024,2048.")
    ] = None,
    steps: Annotated[Optional[int], typer.Option(min=1, help="Decode steps after each prefix. Default: 32.")] = None,
    windows: Annotated[
        Optional[list[Path]], typer.Option(help="A text file of your own instead of the 13 texts; may be repeated.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu or cuda.")] = "cpu",
    revision: Annotated[Optional[str], typer.Option(help="Of a model on the hub.")] = None,
    json_path: Annotated[Optional[Path], typer.Option("--json", help="Also write the figures here.")] = None,
    record_dir: Annotated[
        Optional[Path], typer.Option(help="Write records under this folder instead of the cache.")
    ] = None,
) -> None:
    """Does a format keep the answers of a model? The server obeys the record that a full run writes.

    Exit code 0: passed (every format given; with --all at least one). 3: measured and failed. Others: no verdict.

    Example: sgl-hq gate --model MODEL --format hq7
    """
    from sgl_hq.launch.gate import run

    try:
        prefixes = [int(n) for n in prefix.split(",")] if prefix else None
    except ValueError:
        raise typer.BadParameter(f"{prefix!r} is no list of numbers: give for example 512,1024", param_hint="--prefix") from None
    code = run(
        model=model,
        formats=[name.strip() for name in formats.split(",") if name.strip()] if formats else None,
        all_presets=all_presets,
        prefixes=prefixes,
        steps=steps,
        windows=windows,
        quick=quick,
        device=device,
        revision=revision,
        json_path=json_path,
        record_dir=record_dir,
    )
    raise typer.Exit(code)


@app.command()
def calibrate(
    model: Annotated[Optional[str], typer.Option(help="Folder or hub name. Default: the demo model.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu or cuda.")] = "cpu",
) -> None:
    """Measure once where a model needs bits; formats calib{bits}, for example calib4.75, are made from it.

    Example: sgl-hq calibrate --model MODEL, then sgl-hq gate --model MODEL --format calib4.75
    """
    from sgl_hq.launch.calibrate import run

    raise typer.Exit(run(model, device))


@app.command("demo-model")
def demo_model(
    model: Annotated[
        str, typer.Option(help="smollm2 (94 MB), qwen2.5-coder-0.5b (478 MB) or qwen2.5-coder-1.5b (1.1 GB).")
    ] = "smollm2",
) -> None:
    """Fetch and convert a small real model once; print its folder. Use as: M=$(sgl-hq demo-model)"""
    from sgl_hq.launch.demo_model import ensure_demo_model

    print(ensure_demo_model(name=model))


@app.command()
def formats() -> None:
    """List the page formats: bits per value, bytes per token, what each is for."""
    from rich.console import Console

    from sgl_hq.launch.formats import table

    Console().print(table())


@app.command()
def top(
    url: Annotated[str, typer.Argument(help="Root address of a server that was started with --enable-metrics.")] = "http://127.0.0.1:30000",
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks; rates are of this time.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print one picture and end.")] = False,
) -> None:
    """Watch a server: pages of both tiers, packing, reuse and refusals, live. Ctrl-C ends it.

    Example: sgl-hq top http://127.0.0.1:30000
    """
    from sgl_hq.launch.top import run

    run(url, interval, once)


@app.command()
def doctor() -> None:
    """Check this installation and machine; exit code 0 when nothing must be fixed."""
    from sgl_hq.launch.doctor import run

    raise typer.Exit(run())
