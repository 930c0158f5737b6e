"""How tensors lie in memory, which kernels walk through from one end to the other."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_in_memory(x: Tensor) -> Tensor:
    """x, or a copy of it, whose elements lie in memory without gaps or overlaps, in any order."""
    if x.is_contiguous():
        return x
    dense = torch.empty_like(x, device="meta").stride() == x.stride()
    return x if dense else torch.empty_like(x).copy_(x)


def has_dense_rows(x: Tensor) -> bool:
    """Whether row (dimension 0) follows row in memory, each without gaps."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.is_contiguous() or (x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()]))
