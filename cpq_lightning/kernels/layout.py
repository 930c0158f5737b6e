"""Memory formats of tensors: kernels iterate over memory in order."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_in_memory(x: Tensor) -> Tensor:
    """x, or a copy of it, with elements in memory without gaps or overlaps, in any order."""
    if x.is_contiguous():
        return x
    dense = torch.empty_like(x, device="meta").stride() == x.stride()
    return x if dense else torch.empty_like(x).copy_(x)


def has_dense_rows(x: Tensor) -> bool:
    """Whether rows (dimension 0) lie in memory one after the other, each without gaps."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.is_contiguous() or (x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()]))
