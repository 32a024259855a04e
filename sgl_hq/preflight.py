"""Checks that need no model and no SGLang: they turn the commonest start-up failures into one sentence."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from sgl_hq.config import HQConfigError


def check_model_path(model_path: str | None) -> None:
    """A path that looks local must hold a checkpoint; anything else is left to SGLang as a hub name."""
    if not model_path:
        raise HQConfigError(
            "no model is given: add --model-path DIR (`sgl-hq demo-model` installs one and prints its path)"
        )
    path = Path(model_path).expanduser()
    looks_local = model_path.startswith((".", "/", "~")) or path.exists()
    if not looks_local:
        return
    if not path.exists():
        raise HQConfigError(
            f"model path {model_path} does not exist: check the path, or run `sgl-hq demo-model` for a small model"
        )
    if path.is_dir() and not (path / "config.json").exists():
        raise HQConfigError(
            f"model path {model_path} has no config.json: give the directory of a Hugging Face checkpoint"
        )


def check_port(host: str, port: int) -> None:
    """The address must be free to listen on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as uvicorn: a socket in TIME_WAIT is no obstacle
        try:
            probe.bind((host, port))
        except OSError as error:
            raise HQConfigError(
                f"cannot listen on {host}:{port} ({os.strerror(error.errno)}): stop what uses it or choose another --port"
            ) from None
