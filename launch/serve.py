"""`sgl-hq serve`: resolve, print what was resolved, start SGLang in this very process. It does nothing else."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Mapping, NoReturn

from rich.console import Console
from rich.table import Table

from sgl_hq import preflight
from sgl_hq.config import CPU_PLATFORM, ENV_OF_FIELD, EXACT, SWITCHES, HQConfig, HQConfigError, from_env
from sgl_hq.gate import admission
from sgl_hq.patches.probe import check_version


def serve(args: list[str]) -> NoReturn:
    """`args`: options of `python -m sglang.launch_server`, ours among them, as the user typed them.

    Never returns: the process becomes the server. Raises HQConfigError before anything is started.
    """
    problem = check_version()
    if problem:
        raise HQConfigError(problem)
    argv, env, config = resolve(args, os.environ, has_gpu=_has_gpu())
    console = Console(stderr=True)
    console.print(_table(argv, env, config))
    os.execve(sys.executable, [sys.executable, "-m", "sglang.launch_server", *argv], env)


def resolve(args: list[str], environ: Mapping[str, str], has_gpu: bool) -> tuple[list[str], dict[str, str], HQConfig]:
    """SGLang's arguments, the environment to start it with, and our configuration. Raises HQConfigError.

    Filled in when not given: the format (`bf16` on a CPU, which loses no bit; `exact` on a GPU, where this version
    packs nothing), the CPU platform on a machine without a GPU, and the demo model.
    """
    parser = argparse.ArgumentParser(prog="sgl-hq serve", add_help=False, allow_abbrev=False)
    for field in ENV_OF_FIELD:
        kind = {"action": "store_const", "const": "1"} if field in SWITCHES else {}
        parser.add_argument("--hq-" + field.replace("_", "-"), dest=field, **kind)
    parser.add_argument("--model-path", "--model")
    parser.add_argument("--device")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    known, rest = parser.parse_known_args(args)
    misspelt = [a for a in rest if a.startswith("--hq-")]
    if misspelt:
        options = ", ".join("--hq-" + field.replace("_", "-") for field in ENV_OF_FIELD)
        raise HQConfigError(f"unknown option {misspelt[0]}: known are {options}")

    env = dict(environ)
    on_cpu = (known.device or ("cuda" if has_gpu else "cpu")) == "cpu"
    for field, name in ENV_OF_FIELD.items():
        if getattr(known, field) is not None:
            env[name] = getattr(known, field)
    env.setdefault(ENV_OF_FIELD["format"], "bf16" if on_cpu else EXACT)
    config = from_env(env)
    env.update(config.to_env())

    if known.model_path is None:
        from sgl_hq.launch.demo_model import ensure_demo_model

        known.model_path = str(ensure_demo_model())
    preflight.check_model_path(known.model_path)
    preflight.check_port(known.host, known.port)
    _check_gate(config, known.model_path, rest)

    argv = [*rest, "--model-path", known.model_path, "--host", known.host, "--port", str(known.port)]
    if known.device or on_cpu:
        argv += ["--device", known.device or "cpu"]
    if on_cpu:
        env.setdefault("SGLANG_PLATFORM", CPU_PLATFORM)
    _check_plugin_is_loaded(env)
    return argv, env, config


def _check_plugin_is_loaded(env: Mapping[str, str]) -> None:
    """SGLang leaves our plugin out, without a word, for these two settings (sglang/srt/plugins/__init__.py)."""
    platform, plugins = env.get("SGLANG_PLATFORM"), env.get("SGLANG_PLUGINS")
    if platform and platform != CPU_PLATFORM:
        raise HQConfigError(f"SGLANG_PLATFORM={platform} makes SGLang skip this plugin: unset it, or use {CPU_PLATFORM} on a CPU")
    if plugins and "sgl_hq" not in [name.strip() for name in plugins.split(",")]:
        raise HQConfigError(f"SGLANG_PLUGINS={plugins} makes SGLang skip this plugin: add sgl_hq to it or unset it")


def _check_gate(config: HQConfig, model: str, rest: list[str]) -> None:
    """The same refusal as in the server (patches/server_args.py), before SGLang is imported. rest: SGLang's options."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--revision")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--json-model-override-args", default="{}")
    given, _ = parser.parse_known_args(rest)
    state = admission.gate_state(config, model, given.revision, given.load_format, given.json_model_override_args)
    admission.require(config, state)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _table(argv: list[str], env: Mapping[str, str], config: HQConfig) -> Table:
    table = Table(title="sgl-hq serve", show_header=False, title_justify="left")
    for name, value in config.describe().items():
        table.add_row(f"--hq-{name.replace('_', '-')}", value)
    table.add_row("platform", env.get("SGLANG_PLATFORM", "SGLang's own"))
    table.add_row("sglang", " ".join(argv))
    return table
