"""Kinds without a kernel are refused before anything is launched."""

from __future__ import annotations

import pytest
import torch

from sgl_hq.kernels.page_codec import launcher
from sgl_hq.page_format import PageFormat


def test_calibrated_pages_have_no_kernel_yet():
    layout = PageFormat("c", "transform", 4, 4, k_widths=(4,) * 8, v_widths=(4,) * 8).layout(64)
    records, pages = torch.zeros(1, 1, 1, layout.record_bytes, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    dense = [torch.zeros(64, 1, 64, dtype=torch.bfloat16)]
    with pytest.raises(ValueError, match="no kernel yet: use PageCodec"):
        launcher.pack_pages(layout, dense, dense, pages, records, pages)
    out = torch.full((1, 64, 1, 64), 7.0, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="no kernel yet: use PageCodec"):
        launcher.unpack_pages(layout, records, pages, None, out, out)
    assert (out == 7).all()
