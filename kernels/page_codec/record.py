"""Reading and writing one field of a batch of records."""

from __future__ import annotations

import torch

from sgl_hq.page_format import Field


def put(records: torch.Tensor, field: Field, values: torch.Tensor) -> None:
    """Write `values`, `[A, B, ...]` of any dtype and `field.bytes` a record, into `records`, `[A, B, record_bytes]`."""
    records[..., field.offset : field.end] = values.contiguous().flatten(2).view(torch.uint8)


def get(records: torch.Tensor, field: Field, dtype: torch.dtype) -> torch.Tensor:
    """`[A, B, values of the field] dtype`, a view of `records`, whose strides are multiples of 8 bytes."""
    return records[..., field.offset : field.end].view(dtype)
