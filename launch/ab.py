"""`sgl-hq ab`: vanilla SGLang and this project one after the other, on the same chats and KV bytes, in one table.

`waves.py` says how equal batches are made and checked, `kv_accounts.py` what is counted where, `ab_compare.py` what must
be equal.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI
from rich.console import Console

from sgl_hq.config import EXACT, HQConfig, from_env
from sgl_hq.gate import admission
from sgl_hq.launch.ab_compare import VANILLA, ABError, compare, plugin_block
from sgl_hq.launch.ab_progress import START_STEPS, ABProgress
from sgl_hq.launch.ab_report import Phase, Row, paragraph, row, table, write_json
from sgl_hq.launch.kv_accounts import PeakSampler, bytes_per_token, read_accounts
from sgl_hq.launch.run_facts import run_facts
from sgl_hq.launch.server_process import ServerProcess
from sgl_hq.launch.signals import terminated_like_interrupted
from sgl_hq.launch.waves import run_wave
from sgl_hq.launch.workload import ChatRequest, Workload
from sgl_hq.page_format import DEFAULT_LOSSY, PAGE_TOKENS

PHASES = ("cold", "warm")
Waves = list[list[ChatRequest]]
REQUEST_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Setup:
    """Everything one comparison is made of, resolved."""

    model: str
    arms: tuple[str, ...]
    workload: Workload
    kv_tokens: int  # the KV byte budget of every arm, in bf16 tokens
    pack: str
    packed_fraction: float | str
    token_bytes: int  # KV bytes of one bf16 token
    allow_ungated: bool = False

    def server_args(self, arm: str) -> list[str]:
        """The server's arguments: the same in every arm, then the ones that make it an HQ arm."""
        args = ["--page-size", str(PAGE_TOKENS), "--max-total-tokens", str(self.kv_tokens), "--grammar-backend", "none"]
        args += ["--enable-metrics", "--enable-cache-report", "--decode-log-interval", "1", "--random-seed", "0"]
        args += ["--log-level", "info", "--skip-server-warmup"]
        if arm != VANILLA:
            args += ["--hq-format", arm, "--hq-pack", self.pack, "--hq-packed-fraction", str(self.packed_fraction)]
            args += ["--hq-allow-ungated"] if self.allow_ungated else []
        return args

    def describe(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        return asdict(self) | {"server_args": {arm: self.server_args(arm) for arm in self.arms}}


def run(
    model: str | None = None,
    arms: list[str] | None = None,
    quick: bool = False,
    kv_tokens: int | None = None,
    concurrency: int | None = None,
    prefixes: int | None = None,
    users: int | None = None,
    prefix_tokens: int | None = None,
    output_tokens: int | None = None,
    pack: str | None = None,
    packed_fraction: float | str | None = None,
    allow_ungated: bool = False,
    json_path: Path | None = None,
) -> int:
    """Run the comparison, print the table, write `json_path`; None takes the default (`quick` has smaller ones).

    Returns 0, or 1 when the exact arm differs from vanilla. Raises ABError, ServerFailed or AccountsError when an arm
    could not be measured (the rows of the arms before it are written all the same), HQConfigError or WorkloadError for
    options that cannot be run.
    """
    if from_env() is not None:
        raise ABError("SGLANG_HQ_* options are set: the vanilla arm would inherit them; unset them, the arms set their own")
    arms = arms or [VANILLA, EXACT, DEFAULT_LOSSY]
    pack = pack or "shared"
    packed_fraction = HQConfig.packed_fraction if packed_fraction is None else packed_fraction
    if arms[0] != VANILLA:
        raise ABError(f"The first arm is {arms[0]!r}; it must be {VANILLA!r}, which the others are compared with")
    configs = [HQConfig(arm, pack, packed_fraction, allow_ungated=allow_ungated) for arm in arms if arm != VANILLA]
    if json_path is not None and not json_path.resolve().parent.is_dir():
        raise ABError(f"--json: there is no directory {json_path.resolve().parent}")
    workload = Workload(
        prefixes=prefixes or 4,
        users=users or 16,
        concurrency=concurrency or 8,
        prefix_tokens=prefix_tokens or (768 if quick else 2048),
        output_tokens=output_tokens or (8 if quick else 32),
    )
    model = model or _demo_model()
    waves, token_bytes = _prepare(model, workload)
    for config in configs:  # before the vanilla arm has run for minutes
        admission.require(config, admission.gate_state(config, model))
    setup = Setup(
        model=model,
        arms=tuple(arms),
        workload=workload,
        kv_tokens=kv_tokens or (16384 if quick else 32768),
        pack=pack,
        packed_fraction=packed_fraction,
        token_bytes=token_bytes,
        allow_ungated=allow_ungated,
    )
    rows: list[Row] = []
    logs = Path(tempfile.mkdtemp(prefix="sgl-hq-ab-"))  # kept when an arm fails: the error names the file
    try:
        with terminated_like_interrupted(), ABProgress(len(arms), len(PHASES) * len(waves)) as progress:
            _measure(setup, waves, logs, rows, progress)
    finally:
        if json_path is not None:
            write_json(rows, run_facts(), setup.describe(), json_path)
    shutil.rmtree(logs)
    _show(rows)
    return _verdict(rows)


def _measure(setup: Setup, waves: Waves, logs: Path, rows: list[Row], progress: ABProgress) -> None:
    """Measure every arm; a row is appended to `rows` as soon as its phase has ended."""
    reference: dict[str, Phase] = {}
    for index, arm in enumerate(setup.arms):
        progress.doing(f"{arm}: starting the server")
        log = logs / f"{index}-{arm}.log"
        with ServerProcess(setup.model, setup.server_args(arm), log_path=log, stop_grace_s=0, on_wait=progress.starting) as server:
            progress.step(START_STEPS)
            progress.note(f"{arm}: server ready after {server.start_s:.0f} s")
            for name in PHASES:
                phase = asyncio.run(_phase(server, arm, name, setup, waves, progress))
                difference = compare(reference.setdefault(name, phase).waves, phase.waves)
                rows.append(row(phase, difference, setup.workload.concurrency, setup.token_bytes))
                seconds = sum(wave.duration_s for wave in phase.waves)
                progress.note(f"{arm}, {name}: {rows[-1]['requests']} requests in {seconds:.0f} s")


async def _phase(
    server: ServerProcess, arm: str, name: str, setup: Setup, waves: Waves, progress: ABProgress
) -> Phase:
    """One phase: `cold` empties the prefix cache first, `warm` sends the same requests again."""
    plugin_block(arm, server.server_info(), setup.pack)
    if name == "cold":
        server.flush_cache()
    done = []
    http = httpx.AsyncClient(trust_env=False, timeout=REQUEST_TIMEOUT_S)  # no proxy between us and our own server
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=http, max_retries=0) as client:
        with PeakSampler(server, setup.token_bytes) as sampler:
            for number, wave in enumerate(waves, start=1):
                progress.doing(f"{arm}, {name}: wave {number} of {len(waves)}")
                done.append(await run_wave(server, client, wave, setup.workload.output_tokens))
                progress.step()
    hq = plugin_block(arm, server.server_info(), setup.pack)
    kv = read_accounts(server.metrics(), hq, setup.token_bytes)
    return Phase(arm, name, tuple(done), kv, sampler.peak, hq)


def _show(rows: list[Row]) -> None:
    """Table and paragraph on stdout; the table is never cut, also where the terminal is narrower or stdout is a file."""
    console, shown = Console(), table(rows)
    needed = Console(width=1000).measure(shown).maximum
    Console(width=max(console.width, needed)).print(shown)
    console.print(paragraph(rows), highlight=False, markup=False)


def _verdict(rows: list[Row]) -> int:
    """Say on stderr whether an arm that must equal vanilla does; 1 when one does not."""
    code = 0
    for r in rows:
        if r["arm"] not in (VANILLA, EXACT) or not (r["differing_answers"] or r["differing_logprobs"]):
            continue
        print(
            f"sgl-hq: the {r['arm']} arm differs from vanilla in the {r['phase']} phase: {r['differing_answers']} answers, "
            f"{r['differing_logprobs']} log-probabilities, by up to {r['max_logprob_diff']:.3g} nats "
            f"({r['unequal_waves']} waves had other batches than vanilla's)",
            file=sys.stderr,
        )
        code = 1
    return code


def _prepare(model: str, workload: Workload) -> tuple[Waves, int]:
    """The waves, and the model's KV bytes for each token."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        config, tokenizer = AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ABError(f"No model at {model!r}: give a folder with a checkpoint or a hub name ({reason})") from error
    return workload.waves(tokenizer), bytes_per_token(config.get_text_config())


def _demo_model() -> str:
    from sgl_hq.launch.demo_model import ensure_demo_model

    return str(ensure_demo_model())
