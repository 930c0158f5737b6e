"""Starting steps of a weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpq_lightning.functional.ranges import max_scale, mse_scale
from cpq_lightning.nn.sharding import full_tensor

# Enough values for a step within half a percent of the best one.
_SAMPLE = 2**15


@torch.no_grad()
def weight_scales(weight: Tensor, channel_dim: int | None, widths: Sequence[int], rule: str) -> list[Tensor] | None:
    """The starting step of each width for a weight, by the rule ``"mse"`` or ``"max"``.

    Args:
        weight: Full-precision weight.
        channel_dim: Dimension of the channels that have a step each; ``None`` for one step.
        widths: Widths to fit.
        rule: Least squared error, or nothing clipped.

    Returns:
        For each width steps of shape (channels,) or (1,), float32; a channel of zeros has the mean of the others.
        ``None`` of a weight that holds zeros alone: there is no step to fit to it yet.
    """
    rows = full_tensor(weight.detach()).float()
    rows = rows.reshape(1, -1) if channel_dim is None else rows.movedim(channel_dim, 0).flatten(1)
    if not rows.numel():
        return [rows.new_ones(len(rows)) for _ in widths]
    known = rows.any(1)
    if not known.any():
        return None
    if rule == "max":
        low, high = rows.amin(1), rows.amax(1)
        scales = [max_scale(low, high, bits, signed=True) for bits in widths]
    else:
        sample = rows[:, :: even_stride(rows.shape[1], _SAMPLE)]
        if not sample.any(1).equal(known):
            # A few values among zeros, of which the sample holds none.
            sample = rows
        scales = [mse_scale(sample, bits, signed=True) for bits in widths]
    return [torch.where(known, scale, scale[known].mean()) for scale in scales]


def even_stride(n: int, most: int) -> int:
    """A stride that samples ``most`` of n values evenly: no multiple of a kernel's width, which would see one of its
    corners only.
    """
    stride = max(1, -(-n // most))
    while stride > 1 and any(stride % p == 0 for p in (2, 3, 5, 7)):
        stride += 1
    return stride
