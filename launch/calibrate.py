"""`sgl-hq calibrate`: measure where a model needs bits, once per checkpoint; calibrated formats use it."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def run(model: str | None, device: str) -> int:
    """Writes the calibration into the cache folder; exit code 0. Errors of this package reach the user as a sentence."""
    from sgl_hq.calibration.run import calibrate
    from sgl_hq.calibration.store import calibration_path
    from sgl_hq.calibration.windows import calibration_windows
    from sgl_hq.gate.model_digest import model_digest
    from sgl_hq.gate.run import load_model

    if model is None:
        from sgl_hq.launch.demo_model import ensure_demo_model

        model = str(ensure_demo_model())
    digest = model_digest(model)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("calibrating", total=len(calibration_windows()))
        found = calibrate(load_model(model, device), digest, lambda: progress.advance(task))
    path = calibration_path(digest)
    found.save(path)
    console.print(f"calibration {found.digest} of {model} is in {path}", highlight=False, soft_wrap=True)
    console.print(f"next: sgl-hq gate --model {model} --format calib5", highlight=False, soft_wrap=True)
    return 0
