"""Nesting by resolution with kernels for each width: only the unquantized tensor is saved for backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cpq_lightning.functional.dropbits import shares_from_masks
from cpq_lightning.functional.modes import is_differentiated_again
from cpq_lightning.kernels import dispatch as kernel
from cpq_lightning.kernels.dispatch import QuantGrid
from cpq_lightning.kernels.fused import backward_again, quantize_to_grid


def quantize_widths(
    x: Tensor, scale: Tensor, sigma: Tensor, masks: Tensor, width_scales: Tensor, grids: Sequence[QuantGrid]
) -> Tensor:
    """:func:`cpq_lightning.functional.quantize_resolution` for masks that the full tensor shares, on a CPU.

    ``sum_k share_k q_k(x)``, ``share_k = m_k - m_(k+1)``. Values are bit-exact to functional's, gradients equal up to
    rounding.

    Args:
        x: A tensor for which :func:`~cpq_lightning.kernels.dispatch.has_kernel` returns ``True``.
        scale: Scale of the widest grid, one value or one for each row.
        sigma: Scale parameter of the noise of the widest grid, same shape as ``scale``.
        masks: One value for each width, the narrowest first.
        width_scales: Scale of each width divided by that of the widest, shape (widths, 1 or rows).
        grids: The grid of each width.
    """
    shares = shares_from_masks(masks.reshape(-1))
    return _Widths.apply(x, scale, sigma, shares, width_scales, tuple(grids))  # type: ignore[no-any-return]


class _Widths(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        sigma: Tensor,
        shares: Tensor,
        width_scales: Tensor,
        grids: tuple[QuantGrid, ...],
    ) -> Tensor:
        ctx.save_for_backward(x, scale, sigma, width_scales, shares)
        used = [(k, share) for k, share in enumerate(shares.to(x.dtype).tolist()) if share]
        ctx.settings = grids, used, len(shares)
        terms = (_times(kernel.forward(x, scale * width_scales[k], grids[k]), share) for k, share in used)
        return _sum(terms)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, sigma, width_scales, shares = ctx.saved_tensors
        grids, used, widths = ctx.settings
        d_shares = grad.new_zeros(widths)
        d_x, d_scale, d_sigma = [], torch.zeros_like(scale), torch.zeros_like(sigma)
        again = is_differentiated_again(grad)
        for k, share in used:
            scale_and_sigma = scale * width_scales[k], sigma * width_scales[k]
            if ctx.needs_input_grad[3]:
                d_shares[k] = torch.sum(grad * quantize_to_grid(x, *scale_and_sigma, grids[k]))
            run = backward_again if again else kernel.backward
            d_x_k, d_scale_k, d_sigma_k = run(x, grad, *scale_and_sigma, grids[k])
            # In a double backward, the tensor instead of its value: these gradients have a derivative in the share.
            factor = shares[k] if again else share
            d_x.append(d_x_k * factor if again else _times(d_x_k, share))
            d_scale += d_scale_k * width_scales[k] * factor
            d_sigma += d_sigma_k * width_scales[k] * factor
        return _sum(d_x), d_scale, d_sigma, d_shares, None, None


def _times(term: Tensor, share: float) -> Tensor:
    """``term * share``, in place."""
    return term if share == 1 else term.mul_(share)


def _sum(terms: Any) -> Tensor:
    """The sum of the terms, accumulated in the first one."""
    terms = iter(terms)
    total = next(terms)
    for term in terms:
        total += term
    return total
