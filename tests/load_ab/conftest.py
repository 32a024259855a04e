"""Samples of rows and results are importable below this folder."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # importmode importlib does not add the folder
