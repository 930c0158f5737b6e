"""What the bits of a quantizer are worth to the loss: this project's way to tell it.

The gradient through gates that are drawn (the paper's) is by how much the loss rises where a bit is gone, before the
network has adapted to that. What the loss bends by, to second order, is what HAWQ-V2 (Dong et al., NeurIPS 2020) prices
widths by before training. Where layers may have one bit, widths that are learned by it end where those of Hessian
traces do, and those by drawn gates behind them (``benchmarks/results/findings.md``, learned levels).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpq_lightning.functional.grid import level_bounds


def bit_saliency(
    x: Tensor,
    gradient: Tensor,
    steps: Tensor,
    widths: Sequence[int],
    signed: bool,
    *,
    channel_dim: int = 0,
    blocks: int = 0,
    by_block: bool = False,
) -> Tensor:
    """``sum_B (sum_(i in B) g_i (q_k(x_i) - q_(k-1)(x_i)))^2`` over blocks B, for each width k but the narrowest.

    With ``r`` the residual that a bit adds to a network that is trained with it, taking it away raises the loss by
    about ``r' H r / 2``. Where the gradient ``g`` of a batch is noise about zero, its covariance is that of single
    samples over the number n of samples, which for a likelihood is the Hessian: ``n E[(g · r)^2] = r' H r`` (the
    empirical Fisher information). Half of n times the mean over batches of what is returned is thus what the bit is
    worth, with the Hessian taken for zero between blocks: output channels of a weight, whose scale a norm behind them
    takes out, or samples of an activation, between which it is zero. As n is the same for all bits, it is left out.

    Args:
        x: What is quantized, of any shape and unit.
        gradient: Of the loss, in the quantized values; of the shape of ``x``.
        steps: Step of each width, shape (widths, 1) or (widths, channels), in the unit of ``x``.
        widths: Bits of each, the narrowest first.
        signed: Whether the grids hold negative levels.
        channel_dim: The dimension of ``x`` that the steps of channels are along.
        blocks: The dimension of ``x`` that counts blocks.
        by_block: Whether each block has bits of its own.

    Returns:
        Shape (widths - 1, 1), or (widths - 1, blocks), float32, in the unit of the squared loss.

    Example:
        >>> x, gradient = torch.tensor([[0.75, -0.25]]), torch.tensor([[2.0, 1.0]])
        >>> bit_worth(x, gradient, torch.tensor([[2.0], [1.0]]), (1, 2), signed=True)
        tensor([[4.]])
    """
    x, gradient = torch.atleast_1d(x.float()), torch.atleast_1d(gradient.float())
    ones = [1] * x.dim()
    shape = list(ones)
    if steps.shape[1] > 1:
        shape[channel_dim] = -1
    a = steps.reshape(len(steps), *shape)
    bounds = torch.tensor([level_bounds(bits, signed) for bits in widths], device=x.device, dtype=x.dtype)
    low, high = bounds.reshape(len(steps), 2, *ones).unbind(1)
    # From x, not from 0: differences of these sums keep their figures.
    products = gradient * ((x / a).round().clamp(low, high) * a - x)
    within = [d + 1 for d in range(x.dim()) if d != blocks % x.dim()]
    sums = products.sum(within) if within else products
    squares = sums.diff(dim=0).square()
    return squares if by_block else squares.sum(1, keepdim=True)
