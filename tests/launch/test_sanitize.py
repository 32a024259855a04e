"""What launch/sanitize.sh takes for an error in racecheck's output: everything but the dispatch of warps at a kernel's start."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "sanitize.sh"
DISPATCH = """\
========= Error: Race reported between Read access at attend_hopper+0xf0 in kernel_hopper.py:22
=========     and Write access at attend_hopper+0x4c90 in kernel_hopper.py:22 [214 hazards]
=========     and Write access at attend_hopper+0x8820 in kernel_hopper.py:47 [207 hazards]
"""
END = """12 passed, 55 deselected in 9.37s
========= RACECHECK SUMMARY: {0} hazards displayed ({1} errors, 0 warnings)
"""


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (DISPATCH * 2 + END.format(2, 2), True),
        (DISPATCH + DISPATCH.replace("0xf0", "0x3f0") + END.format(2, 2), False),
        (DISPATCH + DISPATCH.replace("Read access", "Write access") + END.format(2, 2), False),
        (DISPATCH + DISPATCH.replace("attend_hopper+0xf0", "attend_dense+0xf0") + END.format(2, 2), False),
        (DISPATCH * 2 + END.format(2, 3), False),  # more than were printed
        (DISPATCH + END.format(1, 1).replace("12 passed", "1 failed, 11 passed"), False),
        (DISPATCH, False),
    ],
)
def test_judge(tmp_path, text, clean):
    log = tmp_path / "log"
    log.write_text(text)
    assert (subprocess.run(["bash", str(SCRIPT), "--judge", str(log)], check=False).returncode == 0) == clean
