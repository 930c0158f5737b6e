"""Sharded tensors, of which each process holds a part (FSDP2)."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one, gathered by all its processes together; any other tensor unchanged.

    A quantizer's parameters are never sharded: they are small, and each process has all of them.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(value: Tensor, tensor: Tensor) -> Tensor:
    """The part of a full ``value`` that this process holds of ``tensor``; of an unsharded tensor the value itself.

    Every process has computed the full value and keeps its part, without communication.
    """
    if not isinstance(tensor, DTensor):
        return value
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether ``tensor`` is sharded, so that this process holds only a part of it."""
    return isinstance(tensor, DTensor)
