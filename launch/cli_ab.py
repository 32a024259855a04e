"""The command `sgl-hq ab`: equal waves of chats without a plan (`ab.py`), load at equal KV bytes with one (`load_ab/run.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from sgl_hq.config import parse_packed_fraction
from sgl_hq.page_format import DEFAULT_LOSSY, FORMATS

DEFAULT_WAVES_ARMS = f"vanilla,exact,{DEFAULT_LOSSY}"
_WAVES, _LOAD = "In equal waves (without PLAN)", "Under load (with PLAN)"


def ab(
    plan: Annotated[
        Optional[str],
        typer.Argument(help="A YAML file, or a plan of the package such as quick-cpu: capacity and speed under load at equal KV bytes."),
    ] = None,
    model: Annotated[Optional[str], typer.Option(help="Folder or hub name. Default: the plan's; without one the demo model.")] = None,
    arms: Annotated[
        Optional[str],
        typer.Option(
            help=f"Comma-separated. With PLAN: names from it. Without: vanilla, exact, {', '.join(FORMATS)}; "
            f"default {DEFAULT_WAVES_ARMS}."
        ),
    ] = None,
    json_path: Annotated[
        Optional[Path], typer.Option("--json", help="Also write every row here; with PLAN an interrupted run then goes on where it ended.")
    ] = None,
    html_path: Annotated[
        Optional[Path], typer.Option("--html", help="Also write a page with tables and plots here.", rich_help_panel=_LOAD)
    ] = None,
    workloads: Annotated[
        Optional[str], typer.Option(help="Comma-separated names from the plan. Default: all.", rich_help_panel=_LOAD)
    ] = None,
    together: Annotated[
        Optional[int],
        typer.Option(min=1, help="Servers that start at the same time; measured one after another. Default: 1.", rich_help_panel=_LOAD),
    ] = None,
    tokenizer: Annotated[
        Optional[Path],
        typer.Option(help="Folder with tokenizer.json and tokenizer_config.json. Default: the model's.", rich_help_panel=_LOAD),
    ] = None,
    commit: Annotated[
        Optional[str], typer.Option(help="Commit to write into the result where this is no git checkout.", rich_help_panel=_LOAD)
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A small workload that ends within 5 minutes on 2 cores.", rich_help_panel=_WAVES)
    ] = False,
    kv_tokens: Annotated[Optional[int], typer.Option(min=1, help="KV budget of every arm, in bf16 tokens.", rich_help_panel=_WAVES)] = None,
    concurrency: Annotated[Optional[int], typer.Option(min=1, help="Requests in flight at a time.", rich_help_panel=_WAVES)] = None,
    prefixes: Annotated[Optional[int], typer.Option(min=1, help="Number of different system prompts.", rich_help_panel=_WAVES)] = None,
    users: Annotated[Optional[int], typer.Option(min=1, help="Users per system prompt.", rich_help_panel=_WAVES)] = None,
    prefix_tokens: Annotated[
        Optional[int], typer.Option(min=1, help="Length of a system prompt, in tokens.", rich_help_panel=_WAVES)
    ] = None,
    output_tokens: Annotated[Optional[int], typer.Option(min=1, help="Tokens per answer.", rich_help_panel=_WAVES)] = None,
    pack: Annotated[
        Optional[str], typer.Option("--hq-pack", help="When a page is packed: shared, insert or pressure.", rich_help_panel=_WAVES)
    ] = None,
    packed_fraction: Annotated[
        Optional[str],
        typer.Option("--hq-packed-fraction", help="auto (default), or the packed tier's share of the KV budget, 0 to 1.", rich_help_panel=_WAVES),
    ] = None,
    allow_ungated: Annotated[
        bool,
        typer.Option("--hq-allow-ungated", help="Also run formats without a passed quality gate for the model.", rich_help_panel=_WAVES),
    ] = False,
) -> None:
    """Compare vanilla SGLang with this project: same model, same KV bytes, same requests.

    Without PLAN: the same chats in equal waves, do the answers agree? With PLAN: capacity and speed of every arm under load.

    Example: sgl-hq ab quick-cpu --json rows.json --html page.html
    """
    of_waves = {
        "--quick": quick or None, "--kv-tokens": kv_tokens, "--concurrency": concurrency, "--prefixes": prefixes, "--users": users,
        "--prefix-tokens": prefix_tokens, "--output-tokens": output_tokens, "--hq-pack": pack,
        "--hq-packed-fraction": packed_fraction, "--hq-allow-ungated": allow_ungated or None,
    }  # fmt: skip
    of_load = {"--html": html_path, "--workloads": workloads, "--together": together, "--tokenizer": tokenizer, "--commit": commit}
    if plan is not None:
        _refuse(of_waves, "with a plan, which states this itself: leave it out, or change the plan")
        from sgl_hq.launch.load_ab.run import run as run_plan

        raise typer.Exit(run_plan(plan, json_path, html_path, arms, workloads, together or 1, model, tokenizer, commit))
    _refuse(of_load, "without a plan: leave it out, or name a plan, for example sgl-hq ab quick-cpu")
    from sgl_hq.launch.ab import run

    code = run(
        model=model,
        arms=[arm.strip() for arm in (arms or DEFAULT_WAVES_ARMS).split(",") if arm.strip()],
        quick=quick,
        kv_tokens=kv_tokens,
        concurrency=concurrency,
        prefixes=prefixes,
        users=users,
        prefix_tokens=prefix_tokens,
        output_tokens=output_tokens,
        pack=pack,
        packed_fraction=None if packed_fraction is None else parse_packed_fraction(packed_fraction),
        allow_ungated=allow_ungated,
        json_path=json_path,
    )
    raise typer.Exit(code)


def _refuse(given: dict[str, object], why: str) -> None:
    """End with exit code 2 where one of these options is given."""
    if names := [name for name, value in given.items() if value is not None]:
        raise typer.BadParameter(f"{', '.join(names)} cannot be used {why}")
