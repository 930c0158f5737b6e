"""Saliency of the bits of a quantizer: an estimate of how much the loss depends on each bit (ours).

The gradient through sampled gates (the paper's) measures how much the loss rises when a bit is dropped, before the
network has adapted. Saliency measures the curvature of the loss (second order) along the residual that a bit adds, as
HAWQ-V2 (Dong et al., NeurIPS 2020) does to choose widths before training. Where layers may have 1 bit, widths learned
from saliency are as good as those from Hessian traces, and better than those learned through sampled gates
(``benchmarks/results/findings.md``, learned levels).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpq_lightning.functional.grid import level_bounds, nearest_level


def bit_saliency(
    x: Tensor,
    gradient: Tensor,
    scales: Tensor,
    widths: Sequence[int],
    *,
    zero_points: Sequence[float],
    channel_dim: int = 0,
    blocks: int = 0,
    by_block: bool = False,
) -> Tensor:
    """``sum_B (sum_(i in B) g_i (q_k(x_i) - q_(k-1)(x_i)))^2`` over blocks B, for each width k except the narrowest.

    Let ``r`` be the residual that a bit adds in a network trained with that bit, and ``H`` the Hessian of the loss.
    Dropping the bit raises the loss by about ``r' H r / 2``. If the gradient ``g`` of a batch of n samples has mean
    zero, its covariance is that of single samples over n, which for a likelihood is the Hessian: ``n E[(g · r)^2] =
    r' H r`` (the empirical Fisher information). The saliency of the bit is thus ``n / 2`` times the mean of the result
    over batches. The Hessian is taken as zero between blocks. For a weight, blocks are output channels (a norm after
    the layer removes their scale); for an activation they are samples, between which it is exactly zero. The factor
    ``n / 2`` is the same for all bits and left out.

    Args:
        x: The tensor that is quantized, of any shape and unit.
        gradient: Gradient of the loss in the quantized values, same shape as ``x``.
        scales: Scale of each width, shape (widths, 1) or (widths, channels), in the unit of ``x``. A weight in groups
            has the shape (channels, groups, elements), and scales of the shape (widths, channels, groups).
        widths: Widths in bits, the narrowest first.
        zero_points: Zero point of each width.
        channel_dim: The dimension of ``x`` along which scales per channel vary.
        blocks: The dimension of ``x`` that indexes blocks.
        by_block: Whether each block has a separate saliency instead of their sum.

    Returns:
        Shape (widths - 1, 1), or (widths - 1, blocks) with ``by_block``; float32, in the unit of the squared loss.

    Example:
        >>> x, gradient = torch.tensor([[0.75, -0.25]]), torch.tensor([[2.0, 1.0]])
        >>> bit_saliency(x, gradient, torch.tensor([[2.0], [1.0]]), (1, 2), zero_points=(1, 2))
        tensor([[4.]])
    """
    x, gradient = torch.atleast_1d(x.float()), torch.atleast_1d(gradient.float())
    ones = [1] * x.dim()
    shape = list(ones)
    if scales.dim() > 2:
        shape = [*scales.shape[1:], 1]
    elif scales.shape[1] > 1:
        shape[channel_dim] = -1
    a = scales.reshape(len(scales), *shape)
    bounds = torch.tensor(
        [level_bounds(bits, z) for bits, z in zip(widths, zero_points, strict=True)],
        device=x.device,
        dtype=x.dtype,
    )
    low, high = bounds.reshape(len(scales), 2, *ones).unbind(1)
    # Errors (minus x) instead of quantized values: differences of their sums lose fewer digits.
    products = gradient * (nearest_level(x / a, low, high) * a - x)
    within = [d + 1 for d in range(x.dim()) if d != blocks % x.dim()]
    sums = products.sum(within) if within else products
    squares = sums.diff(dim=0).square()
    return squares if by_block else squares.sum(1, keepdim=True)
