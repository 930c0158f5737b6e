"""Sharded tensors, of which each process holds a part (FSDP2)."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one, gathered by all its processes together; any other tensor unchanged.

    A quantizer's parameters are never sharded: they are small, and each process has all of them.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether ``tensor`` is sharded, so that this process holds only a part of it."""
    return isinstance(tensor, DTensor)
