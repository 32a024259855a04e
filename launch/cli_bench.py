"""The commands `sgl-hq bench kernels` and `sgl-hq bench serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from sgl_hq.config import AUTO, parse_packed_fraction

bench = typer.Typer(help="Compare with vanilla on a GPU: attention kernels, or whole servers under load.", no_args_is_help=True)

_JSON = Annotated[Optional[Path], typer.Option("--json", help="Also write every row here, with commit, versions and command.")]
_COMMIT = Annotated[Optional[str], typer.Option(help="Commit to write into the rows where this is no git checkout.")]


@bench.command("kernels")
def bench_kernels(
    cases: Annotated[Optional[str], typer.Option(help="Comma-separated, of A, B, C, D. Default: all.")] = None,
    formats: Annotated[
        Optional[str], typer.Option(help="Comma-separated page formats; '' measures the baselines only. Default: all presets but hq7.")
    ] = None,
    json_path: _JSON = None,
    quick: Annotated[bool, typer.Option("--quick", help="Cases A and C, formats bf16 and hq4, fewer repetitions.")] = False,
    commit: _COMMIT = None,
) -> None:
    """One layer's decode attention: ours beside FlashInfer (bf16, fp8, cascade), FlashAttention-3 and SGLang's Triton kernels.

    Exit code 0: everything was measured. 1: an arm computed something wrong or broke; the others are shown all the same.

    Example: sgl-hq bench kernels --cases A,B --formats hq4,hq6 --json rows.json
    """
    from sgl_hq.launch.bench_kernels import run

    raise typer.Exit(run(cases, formats, json_path, quick, commit))


@bench.command("serve")
def bench_serve(
    workloads: Annotated[
        Optional[str], typer.Option(help="Comma-separated, of 4x16, 1x256, cold, unshared, own8192, own32000. Default: all.")
    ] = None,
    arms: Annotated[
        Optional[str],
        typer.Option(help="Comma-separated: vanilla or a format, perhaps with /flashinfer, /fa3 or /triton; vanilla/flashinfer/fp8_e4m3."),
    ] = None,
    model: Annotated[
        Optional[str], typer.Option(help="Folder or hub name. Default: the shape of Qwen2.5-7B with dummy weights.")
    ] = None,
    tokenizer: Annotated[
        Optional[Path],
        typer.Option(help="Folder with tokenizer.json and tokenizer_config.json, 49,152 words at most. Default: the demo model's."),
    ] = None,
    kv_tokens: Annotated[
        Optional[int], typer.Option(min=1, help="KV byte budget of every arm, in bfloat16 tokens. Default: what the workloads need.")
    ] = None,
    packed_fraction: Annotated[
        str, typer.Option("--hq-packed-fraction", help="auto, or the share of it for the packed tier.")
    ] = AUTO,
    pack: Annotated[
        Optional[str],
        typer.Option("--hq-pack", help="shared or insert for all workloads: one server an arm. Default: what each workload asks for."),
    ] = None,
    together: Annotated[
        int, typer.Option(min=1, help="Servers that start at the same time on the GPU; measured one after another.")
    ] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of every workload; figures are medians.")] = 3,
    json_path: _JSON = None,
    quick: Annotated[bool, typer.Option("--quick", help="Workload 4x16, arms vanilla and hq4.")] = False,
    commit: _COMMIT = None,
) -> None:
    """Whole servers under SGLang's load generator: same KV bytes, same requests, vanilla beside ours.

    Exit code 0: everything was measured. 1: an arm could not be; the rows of the others are shown and written all the same.

    Example: sgl-hq bench serve --workloads 4x16,1x256 --arms vanilla,vanilla/fa3,hq4 --json rows.json
    """
    from sgl_hq.launch.bench_serve import run

    code = run(
        workloads=workloads,
        arms=arms,
        model=model,
        tokenizer=tokenizer,
        kv_tokens=kv_tokens,
        packed_fraction=parse_packed_fraction(packed_fraction),
        pack=pack,
        together=together,
        repeats=repeats,
        json_path=json_path,
        quick=quick,
        commit=commit,
    )
    raise typer.Exit(code)
