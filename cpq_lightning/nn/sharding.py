"""Sharded tensors, of which each process holds a part (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

# Gives a part of a tensor, as a view of it.
View = Callable[[Tensor], Tensor]


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


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself: the view of a weight that is a Parameter."""
    return tensor


@torch.no_grad()
def write_part(tensor: Tensor, view: View, value: Tensor) -> None:
    """Write a part of a tensor, of which each process may hold a shard.

    Args:
        tensor: The tensor to write to.
        view: Gives the part as a view of the full tensor.
        value: The full part.
    """
    if not isinstance(tensor, DTensor):
        view(tensor).copy_(value)
        return
    full = full_tensor(tensor.detach()).clone()
    view(full).copy_(value)
    tensor.copy_(sharded_like(full, tensor))


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether ``tensor`` is sharded, so that this process holds only a part of it."""
    return isinstance(tensor, DTensor)
