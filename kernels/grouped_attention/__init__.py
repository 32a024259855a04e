"""Attention of many query rows over one run of unpacked keys, as an attention state."""

from sgl_hq.kernels.grouped_attention.reference import attend_group

__all__ = ["attend_group"]
