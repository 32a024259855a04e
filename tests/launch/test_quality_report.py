"""docs/quality.md is what its command writes from the committed results, which lie beside those of benchmarks."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_committed_page_is_written_from_the_committed_results(tmp_path):
    from sgl_hq.launch import quality_report

    docs = shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (docs / "quality.md").unlink()
    quality_report.write(docs)
    assert (docs / "quality.md").read_text() == (ROOT / "docs" / "quality.md").read_text()
