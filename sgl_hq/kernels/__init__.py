"""Packing pages and attending to them. The sources are in `kernels/` at the top of the repository (pyproject.toml maps them)."""
