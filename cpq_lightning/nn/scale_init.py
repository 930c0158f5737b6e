"""Scale initialization of a weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpq_lightning.functional.ranges import max_scale, mse_scale
from cpq_lightning.nn.sharding import full_tensor

# Number of values that give a scale within half a percent of the best one.
_SAMPLE_SIZE = 2**15


@torch.no_grad()
def weight_scales(weight: Tensor, channel_dim: int | None, widths: Sequence[int], rule: str) -> list[Tensor] | None:
    """The initial scale of a weight for each width, by the rule ``"mse"`` or ``"max"``.

    Args:
        weight: Full-precision weight.
        channel_dim: Dimension of the channels with one scale each; ``None`` for a single scale.
        widths: Widths to fit.
        rule: ``"mse"`` for the least squared error, ``"max"`` for no clipping.

    Returns:
        For each width scales of shape (channels,) or (1,), float32; a channel of zeros gets the mean of the others.
        ``None`` for a weight of zeros only, to which no scale can be fitted.
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
        scales = [max_scale(low, high, bits=bits, signed=True) for bits in widths]
    else:
        sample = rows[:, :: even_stride(rows.shape[1], _SAMPLE_SIZE)]
        if not sample.any(1).equal(known):
            # The sample misses the few nonzero values of a channel.
            sample = rows
        scales = [mse_scale(sample, bits=bits, signed=True) for bits in widths]
    return [torch.where(known, scale, scale[known].mean()) for scale in scales]


def even_stride(n: int, max_samples: int) -> int:
    """A stride that samples about ``max_samples`` of n values evenly. It has no factor 2, 3, 5 or 7: a multiple of the
    kernel size would sample a single kernel position.
    """
    stride = max(1, -(-n // max_samples))
    while stride > 1 and any(stride % p == 0 for p in (2, 3, 5, 7)):
        stride += 1
    return stride
