"""Groups: consecutive inputs of each output of a linear weight that share a scale.

A weight of shape (out, in) in groups of ``size`` inputs is a matrix of shape (groups, size), with ``ceil(in / size)``
rows for each output, the outputs one after the other. All computation with one scale for each row holds for this
matrix. The last group of an output may have fewer inputs: its row ends with zeros, which count nowhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cpq_lightning.functional.grid import along_channels


def group_count(inputs: int, size: int) -> int:
    """The number of groups of one output; the last one may be incomplete.

    Example:
        >>> group_count(96, 32), group_count(100, 32)
        (3, 4)
    """
    return -(-inputs // size)


def to_groups(weight: Tensor, size: int) -> Tensor:
    """The matrix of groups of a weight, a view where :func:`is_view` holds.

    Args:
        weight: Shape (out, in).
        size: Inputs in a group.

    Returns:
        Shape (out · ceil(in / size), size). An incomplete group ends with zeros, whose gradient is dropped.

    Example:
        >>> to_groups(torch.tensor([[1, 2, 3], [4, 5, 6]]), 2).tolist()
        [[1, 2], [3, 0], [4, 5], [6, 0]]
    """
    outputs, inputs = weight.shape
    missing = -inputs % size
    filled = F.pad(weight, (0, missing)) if missing else weight
    return filled.reshape(outputs * group_count(inputs, size), size)


def from_groups(groups: Tensor, inputs: int) -> Tensor:
    """The inverse of :func:`to_groups`.

    Args:
        groups: Shape (groups, size).
        inputs: Inputs of the weight.

    Returns:
        Shape (out, inputs).

    Example:
        >>> from_groups(torch.tensor([[1, 2], [3, 0], [4, 5], [6, 0]]), 3).tolist()
        [[1, 2, 3], [4, 5, 6]]
    """
    size = groups.shape[1]
    count = group_count(inputs, size)
    weight = groups.reshape(len(groups) // count, count * size)
    # In memory, rows without gaps: kernels and exporters take these.
    return weight if count * size == inputs else weight[:, :inputs].contiguous()


def is_view(weight: Tensor, size: int) -> bool:
    """Whether the groups of a weight of shape (out, in) are complete, and lie one after the other in memory."""
    return weight.shape[1] % size == 0 and weight.is_contiguous()


def membership(weight: Tensor, size: int) -> Tensor | None:
    """1 for each element of the matrix of groups that is one of the weight, 0 where an incomplete group is filled up;
    ``None`` if all groups are complete.
    """
    if weight.shape[1] % size == 0:
        return None
    return to_groups(torch.ones_like(weight), size)


def spread(values: Tensor, inputs: int, size: int) -> Tensor:
    """The value of each input, from one value for each group.

    Args:
        values: Shape (..., ceil(inputs / size)).
        inputs: Number of inputs.
        size: Inputs in a group.

    Returns:
        Shape (..., inputs).

    Example:
        >>> spread(torch.tensor([[1, 2], [3, 4]]), 3, 2).tolist()
        [[1, 1, 2], [3, 3, 4]]
    """
    return values[..., None].expand(*values.shape, size).flatten(-2)[..., :inputs]


def scale_of_each(scale: Tensor, shape: torch.Size, channel_dim: int, size: int) -> Tensor:
    """Scales, or other values in the same form, broadcastable to a weight.

    Args:
        scale: One value, one for each channel, or one for each group, the outputs one after the other.
        shape: Shape of the weight.
        channel_dim: The dimension of the channels.
        size: Inputs in a group; 0 if the weight has no groups.

    Example:
        >>> scale_of_each(torch.tensor([1, 2]), torch.Size((2, 3)), 0, 0).tolist()
        [[1], [2]]
        >>> scale_of_each(torch.tensor([1, 2, 3, 4]), torch.Size((2, 3)), 0, 2).tolist()
        [[1, 1, 2], [3, 3, 4]]
    """
    if size and len(scale) > 1:
        outputs, inputs = shape
        return spread(scale.reshape(outputs, group_count(inputs, size)), inputs, size)
    return along_channels(scale, len(shape), channel_dim)
