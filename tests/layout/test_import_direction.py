"""Who may import whom, read from the syntax trees: what must stay testable alone stays alone.

`cache` and `attention` share only the pool and the records, the kernels know no SGLang, the launcher starts processes.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("sglang", "torch", "triton", "transformers")


@dataclass(frozen=True)
class Rule:
    """Modules at or below `who` import none of `never`, and at module level none of `never_at_load` either."""

    who: tuple[str, ...]
    never: tuple[str, ...] = ()
    never_at_load: tuple[str, ...] = ()
    but: tuple[str, ...] = ()  # exceptions to `never`


RULES = (
    Rule(("sgl_hq.page_format",), never=("sgl_hq", *HEAVY), but=("sgl_hq.page_format",)),
    Rule(("sgl_hq.config",), never=("sgl_hq", *HEAVY), but=("sgl_hq.page_format", "sgl_hq.records")),
    Rule(
        ("sgl_hq.kernels",),
        never=("sglang", "sgl_hq"),
        but=("sgl_hq.kernels", "sgl_hq.page_format", "sgl_hq.records"),
        never_at_load=("triton",),
    ),
    Rule(
        (
            "sgl_hq.gate", "sgl_hq.calibration", "sgl_hq.baselines", "sgl_hq.lab", "sgl_hq.hq_cache", "sgl_hq.prefix_codec",
            "sgl_hq.layer_codecs",
        ),
        never=("sglang", "sgl_hq.launch", "sgl_hq.pool", "sgl_hq.patches", "sgl_hq.plugin"),
    ),
    Rule(("sgl_hq.cache",), never=("sgl_hq.attention",)),
    Rule(("sgl_hq.attention",), never=("sgl_hq.cache",)),
    Rule(("sgl_hq.pool",), never=("sgl_hq.cache", "sgl_hq.attention", "sgl_hq.patches", "sgl_hq.plugin")),
    Rule(
        ("sgl_hq.launch",),
        never=("sgl_hq.pool", "sgl_hq.cache", "sgl_hq.attention", "sgl_hq.platform_cpu", "sgl_hq.plugin"),
        never_at_load=("sglang", "torch", "transformers"),
    ),
    Rule(
        ("sgl_hq.pool", "sgl_hq.cache", "sgl_hq.attention", "sgl_hq.platform_cpu", "sgl_hq.patches", "sgl_hq.plugin"),
        never=("sgl_hq.launch",),
    ),
    Rule(("sgl_hq",), never=("launch", "patches", "kernels", "tests")),  # the mapped folders go by their package names
)  # fmt: skip
# A file kernel*.py is imported by its launcher only when a kernel is about to run, so it may load triton.
DEVICE_FILES = "kernel"


def violations(root: Path) -> list[str]:
    """One line per forbidden import under `root`, laid out as this repository."""
    found = []
    for module, file in _modules(root):
        for imported, line, at_load in _imports(module, file):
            for rule in RULES:
                if not _below(module, rule.who) or _below(imported, rule.but):
                    continue
                at_load_too = at_load and not module.rpartition(".")[2].startswith(DEVICE_FILES)
                if _below(imported, rule.never) or (at_load_too and _below(imported, rule.never_at_load)):
                    found.append(f"{file.relative_to(root)}:{line}: {module} imports {imported}")
                    break
    return found


def _below(module: str, tops: tuple[str, ...]) -> bool:
    return any(module == top or module.startswith(top + ".") for top in tops)


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    for top, prefix in (("sgl_hq", ""), ("kernels", "sgl_hq."), ("patches", "sgl_hq."), ("launch", "sgl_hq.")):
        for file in sorted((root / top).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            yield prefix + ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def _imports(module: str, file: Path) -> Iterator[tuple[str, int, bool]]:
    """(imported name, line, runs when the module is loaded). Imports only for type checkers are left out."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]

    def walk(node: ast.AST, at_load: bool) -> Iterator[tuple[str, int, bool]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.orelse:
                yield from walk(child, at_load)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, at_load
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:  # the name may be a submodule
                yield f"{source}.{alias.name}", node.lineno, at_load
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "import_module",
            "__import__",
        ):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value), node.lineno, at_load
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_load and not inside)

    yield from walk(ast.parse(file.read_text()), True)


def test_this_repository():
    assert len(list(_modules(ROOT))) > 20  # the walk found the tree
    assert violations(ROOT) == []


FORBIDDEN = [
    ("sgl_hq/page_format.py", "import torch"),
    ("sgl_hq/page_format.py", "def f():\n    from sgl_hq.config import HQConfig"),
    ("sgl_hq/config.py", "from sglang.srt.server_args import ServerArgs"),
    ("sgl_hq/config.py", "def f():\n    import triton.language as tl"),
    ("sgl_hq/config.py", "from .pool import two_tier_pool"),
    ("kernels/page_codec/reference.py", "def f():\n    import sglang"),
    ("kernels/page_codec/launcher.py", "import triton"),
    ("kernels/page_codec/launcher.py", "from sgl_hq.pool.packed_tier import PackedTier"),
    ("sgl_hq/cache/pack_policy.py", "from sgl_hq.attention.grouping import group"),
    ("sgl_hq/cache/pack_policy.py", "from ..attention import grouping"),
    ("sgl_hq/cache/pack_policy.py", "from .. import attention"),
    ("sgl_hq/cache/__init__.py", "from ..attention import grouping"),
    ("sgl_hq/attention/grouping.py", "def f():\n    import sgl_hq.cache.live_requests"),
    ("sgl_hq/attention/grouping.py", "import importlib\nimportlib.import_module('sgl_hq.cache')"),
    ("sgl_hq/pool/two_tier_pool.py", "from sgl_hq.cache import packing_radix_cache"),
    ("launch/ab.py", "import sglang"),
    ("launch/ab.py", "try:\n    from sglang.version import __version__\nexcept ImportError:\n    pass"),
    ("launch/serve.py", "class A:\n    import torch"),
    ("launch/serve.py", "def f():\n    from sgl_hq.pool import packed_tier"),
    ("patches/scheduler.py", "from sgl_hq.launch import doctor"),
    ("sgl_hq/plugin.py", "import sgl_hq.launch.cli"),
    ("sgl_hq/plugin.py", "from patches import ledger"),
]
ALLOWED = [
    ("sgl_hq/config.py", "from sgl_hq.page_format import FORMATS"),
    ("sgl_hq/page_format.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
    (
        "kernels/page_codec/launcher.py",
        "def f():\n    import triton\nfrom sgl_hq.page_format import FORMATS\nfrom . import kernel",
    ),
    ("kernels/page_codec/kernel_pack.py", "import triton\nimport triton.language as tl"),
    ("launch/doctor.py", "def f():\n    import sglang, torch\n    from sgl_hq.patches.probe import check_all"),
    ("launch/ab.py", "from .workload import chats\nimport openai"),
    ("sgl_hq/attention/hq_attn_backend.py", "from sgl_hq.pool import two_tier_pool\nimport sglang, torch"),
    ("sgl_hq/cachefoo.py", "import sgl_hq.attention"),
]


def plant(root: Path, file: str, source: str) -> None:
    (root / file).parent.mkdir(parents=True)
    (root / file).write_text(source + "\n")


@pytest.mark.parametrize("file, source", FORBIDDEN)
def test_planted_violation_is_found(tmp_path, file, source):
    plant(tmp_path, file, source)
    found = violations(tmp_path)
    assert len(found) == 1 and found[0].startswith(f"{file}:")


@pytest.mark.parametrize("file, source", ALLOWED)
def test_allowed_import_is_not(tmp_path, file, source):
    plant(tmp_path, file, source)
    assert violations(tmp_path) == []
