"""Starting steps of a weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpq_lightning.functional import fit_step, max_step
from cpq_lightning.nn.sharding import whole

# Enough values for a step within half a percent of the best one.
_SAMPLE = 2**15


@torch.no_grad()
def weight_steps(weight: Tensor, channel_dim: int | None, widths: Sequence[int], rule: str) -> list[Tensor]:
    """The starting step of each width for a weight, by the rule ``"mse"`` or ``"max"``.

    Args:
        weight: Full-precision weight.
        channel_dim: Dimension of the channels that have a step each; ``None`` for one step.
        widths: Widths to fit.
        rule: Least squared error, or nothing clipped.

    Returns:
        For each width steps of shape (channels,) or (1,), float32.
    """
    rows = whole(weight.detach()).float()
    rows = rows.reshape(1, -1) if channel_dim is None else rows.movedim(channel_dim, 0).flatten(1)
    if not rows.numel():
        return [rows.new_ones(len(rows)) for _ in widths]
    if rule == "max":
        low, high = rows.amin(1), rows.amax(1)
        return [max_step(low, high, bits, signed=True) for bits in widths]
    sample = rows[:, :: _stride(rows.shape[1])]
    return [fit_step(sample, bits, signed=True) for bits in widths]


def _stride(n: int) -> int:
    """A stride that samples evenly: no multiple of a kernel's width, which would see one of its corners only."""
    stride = -(-n // _SAMPLE)
    while stride > 1 and any(stride % p == 0 for p in (2, 3, 5, 7)):
        stride += 1
    return stride
