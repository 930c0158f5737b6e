"""Scale initialization of a weight."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cpq_lightning.functional.grid import balanced_zero_point, signed_zero_point
from cpq_lightning.functional.grid_fit import GridFit
from cpq_lightning.functional.groups import membership, to_groups
from cpq_lightning.functional.ranges import max_scale, mse_scale
from cpq_lightning.nn.sharding import full_tensor

# Number of values that give a scale within half a percent of the best one.
_SAMPLE_SIZE = 2**15
# With weight_grid="auto", weights of up to so many bits get a balanced grid.
BALANCED_BITS = 1


class WeightRows(NamedTuple):
    """The values of a weight by scale.

    Attributes:
        values: Shape (scales, n), float32; an incomplete group ends with zeros.
        counts: 1 for each value of the weight, 0 for the zeros at the end of an incomplete group, same shape; ``None``
            if all values are those of the weight.
        grouped: Whether each row is a group.
    """

    values: Tensor
    counts: Tensor | None = None
    grouped: bool = False

    def of(self, where: Tensor) -> WeightRows:
        """Some of the rows: those where a tensor of booleans is true."""
        return self._replace(values=self.values[where], counts=None if self.counts is None else self.counts[where])

    def sample(self, most: int) -> WeightRows:
        """About ``most`` values of each row, contiguous."""
        if not self.values.numel():
            return self
        values, counts = (None if t is None else t[:, :: even_stride(t.shape[1], most)].contiguous() for t in self[:2])
        assert values is not None
        return self._replace(values=values, counts=counts)


def weight_rows(weight: Tensor, channel_dim: int | None, group_size: int = 0) -> WeightRows:
    """The values of a weight by scale.

    Args:
        weight: Full-precision weight.
        channel_dim: Dimension of the channels with one scale each; ``None`` for a single scale.
        group_size: Inputs of a group with one scale each; 0 if the weight has no groups.
    """
    values = full_tensor(weight.detach()).float()
    if group_size:
        return WeightRows(to_groups(values, group_size), membership(values, group_size), grouped=True)
    return WeightRows(values.reshape(1, -1) if channel_dim is None else values.movedim(channel_dim, 0).flatten(1))


@torch.no_grad()
def fit_rows(
    weight: WeightRows, widths: Sequence[int], rule: str, balanced: Collection[int] = ()
) -> list[GridFit] | None:
    """The initial grid of a weight for each width, by the rule ``"mse"`` or ``"max"``.

    Args:
        weight: The values of the full-precision weight by scale.
        widths: Widths to fit.
        rule: ``"mse"`` for the least squared error, ``"max"`` for no clipping.
        balanced: The widths whose grid is balanced; others are signed.

    Returns:
        For each width a grid with scales of shape (scales,); a row of zeros gets the mean scale of the others. ``None``
        for a weight of zeros only, to which no scale can be fitted.
    """
    rows = weight.values
    zero_points = [balanced_zero_point(k) if k in balanced else signed_zero_point(k) for k in widths]
    if not rows.numel():
        return [GridFit(rows.new_ones(len(rows)), z) for z in zero_points]
    known = rows.any(1)
    if not known.any():
        return None
    grids = list(zip(widths, zero_points, strict=True))
    if rule == "max":
        low, high = rows.amin(1), rows.amax(1)
        scales = [max_scale(low, high, bits=bits, zero_point=z) for bits, z in grids]
    else:
        sample = weight.sample(_SAMPLE_SIZE)
        if not sample.values.any(1).equal(known):
            # The sample misses the few nonzero values of a channel.
            sample = weight
        # A weight has so many groups that the sum of their errors has no local minima.
        thorough = False if weight.grouped else None
        scales = [
            mse_scale(sample.values, bits=bits, zero_point=z, counts=sample.counts, thorough=thorough)
            for bits, z in grids
        ]
    return [
        GridFit(torch.where(known, scale, scale[known].mean()), z) for scale, z in zip(scales, zero_points, strict=True)
    ]


@torch.no_grad()
def balanced_widths(weight: Tensor, widths: Sequence[int], grid: str, nested_from: int) -> set[int]:
    """The widths at which a weight gets a balanced grid, which has no level 0.

    A weight whose zeros mean something keeps a level 0 at all widths: see :func:`has_meaningful_zeros`.

    Args:
        weight: Full-precision weight.
        widths: The widths that are fitted, the widest first.
        grid: ``"auto"``: widths up to :data:`BALANCED_BITS`; ``"balanced"``: up to 7 bits, as codes of 8 bits are odd
            numbers up to 255, which no byte holds; ``"signed"``: none.
        nested_from: The narrowest width. Widths that nest by range share one kind of grid: that of a single fitted
            width is balanced if its narrowest one is.
    """
    most = {"auto": BALANCED_BITS, "balanced": 7}.get(grid, 0)
    decisive = {k: k if len(widths) > 1 or grid == "balanced" else nested_from for k in widths}
    chosen = {k for k, decides in decisive.items() if decides <= most and k <= 7}
    return set() if not chosen or has_meaningful_zeros(weight) else chosen


@torch.no_grad()
def has_meaningful_zeros(weight: Tensor) -> bool:
    """Whether exact zeros of a weight mean something, as those of a pruning mask or of a padding row do: more than a
    thousandth of its elements are zero, or a complete row or column (index of the first or the second dimension).
    """
    zeros = full_tensor(weight.detach()) == 0
    if not bool(zeros.any()):
        return False
    if bool(zeros.sum() > zeros.numel() / 1000):
        return True
    return any(bool(zeros.movedim(dim, 0).flatten(1).all(1).any()) for dim in range(min(2, zeros.dim())))


def even_stride(n: int, max_samples: int) -> int:
    """A stride that samples about ``max_samples`` of n values evenly. It has no factor 2, 3, 5 or 7: a multiple of the
    kernel size would sample a single kernel position.
    """
    stride = max(1, -(-n // max_samples))
    while stride > 1 and any(stride % p == 0 for p in (2, 3, 5, 7)):
        stride += 1
    return stride
