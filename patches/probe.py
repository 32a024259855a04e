"""Does the installed SGLang look as the ledger expects? Run at every start and by `sgl-hq doctor`."""

from __future__ import annotations

import importlib.metadata
import inspect
import pkgutil

from sgl_hq.patches.ledger import LEDGER, SUPPORTED_SGLANG, Patch


def check_version() -> str | None:
    """One sentence if the installed SGLang is not the supported one, else None. Imports nothing of SGLang."""
    try:
        found = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return f"SGLang is not installed: install sglang=={SUPPORTED_SGLANG}"
    if found != SUPPORTED_SGLANG:
        return f"SGLang {found} is installed and sgl_hq supports {SUPPORTED_SGLANG} only: install sglang=={SUPPORTED_SGLANG}"
    return None


def check_patch(patch: Patch) -> str | None:
    """One sentence if the target is missing or takes other parameters, else None."""
    owner_name, name = patch.target.rsplit(".", 1)
    try:
        target = inspect.getattr_static(pkgutil.resolve_name(owner_name), name)
    except (ImportError, AttributeError) as error:
        return f"{patch.target} is gone ({error})"
    target = inspect.unwrap(getattr(target, "__func__", target))  # our own hook may already be around it
    found = tuple(inspect.signature(target).parameters)
    if found != patch.parameters:
        return f"{patch.target} takes {found}, expected {patch.parameters}"
    return None


def check_all(patches: tuple[Patch, ...] = LEDGER) -> list[str]:
    """All problems, empty if SGLang looks as expected. Imports the SGLang modules that hold the targets."""
    version = check_version()
    if version:
        return [version]
    return [problem for problem in map(check_patch, patches) if problem]
