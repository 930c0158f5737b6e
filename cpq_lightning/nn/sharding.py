"""Tensors of which each process holds a part only (FSDP2)."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor of a sharded one, gathered by all its processes at once; any other as it is.

    A quantizer's own parameters are never sharded: they are few, and each process has them all.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether this process holds a part only."""
    return isinstance(tensor, DTensor)
