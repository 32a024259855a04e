"""`sglang.srt.model_executor.runner`: every decode graph in two variants.

The stock variant is captured and replayed as without us: a batch that reads no packed page runs vanilla's kernels and
nothing else. The packed variant adds the grouped kernels and the merge. SGLang tells variants of one batch size apart
by a label, which it uses for LoRA.
"""

from __future__ import annotations


def capture_both_variants(original, runner, size, forward, stream_idx=None, variant_label=None):
    """AROUND DecodeCudaGraphRunner.capture_one_shape. Stock first: its metadata buffers serve both."""
    from sgl_hq.config import from_env

    original(runner, size, forward, stream_idx, variant_label)
    if not from_env().packs:
        return
    backend = runner.attn_backend
    backend.captures_packed_variant = True
    try:
        original(runner, size, forward, stream_idx, _packed(variant_label))
    finally:
        backend.captures_packed_variant = False


def pick_variant(original, runner, forward_batch):
    """AROUND DecodeCudaGraphRunner._resolve_lora_variant, which SGLang asks after it has prepared the batch's metadata."""
    label = original(runner, forward_batch)
    return _packed(label) if runner.attn_backend.reads_packed else label


def runs_in_graph(original, runner, forward_batch):
    """AROUND DecodeCudaGraphRunner.can_run_graph: a batch with more levels of sharing than a graph's plan holds runs eagerly."""
    return original(runner, forward_batch) and runner.attn_backend.fits_graph(forward_batch)


def _packed(label: str | None) -> str:
    return "packed" if label is None else f"packed {label}"
