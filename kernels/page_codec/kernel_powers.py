"""`next_power_of_2` for kernels. Not Triton's: SGLang replaces `triton.next_power_of_2` by a plain function (`srt/utils/common.py`),
which no kernel compiled after that can call."""

from __future__ import annotations

import triton


@triton.constexpr_function
def next_power_of_2(n):
    """Smallest power of two that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()
