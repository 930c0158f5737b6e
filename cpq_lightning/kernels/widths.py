"""Nesting by resolution where kernels compute each width: nothing but the unquantized tensor is kept for backward."""

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
    x: Tensor, step: Tensor, sigma: Tensor, masks: Tensor, scales: Tensor, rings: Sequence[QuantGrid]
) -> Tensor:
    """:func:`cpq_lightning.functional.quantize_resolution` for masks that the whole tensor shares, on a CPU.

    ``sum_k share_k q_k(x)``, ``share_k = m_k - m_(k+1)``: functional's values to the bit, its gradients to rounding.

    Args:
        x: What :func:`~cpq_lightning.kernels.dispatch.has_kernel` says yes to.
        step: Step of the widest grid, one value or one for each row.
        sigma: Scale of its noise, likewise.
        masks: One value for each width, the narrowest first.
        scales: Step of each width over that of the widest, shape (widths, 1 or rows).
        rings: The levels of each width.
    """
    shares = shares_from_masks(masks.reshape(-1))
    return _Widths.apply(x, step, sigma, shares, scales, tuple(rings))  # type: ignore[no-any-return]


class _Widths(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, sigma: Tensor, shares: Tensor, scales: Tensor, rings: tuple[QuantGrid, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, step, sigma, scales, shares)
        drawn = [(k, share) for k, share in enumerate(shares.to(x.dtype).tolist()) if share]
        ctx.settings = rings, drawn, len(shares)
        terms = (_times(kernel.forward(x, step * scales[k], rings[k]), share) for k, share in drawn)
        return _sum(terms)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, step, sigma, scales, shares = ctx.saved_tensors
        rings, drawn, widths = ctx.settings
        d_shares = grad.new_zeros(widths)
        d_x, d_step, d_sigma = [], torch.zeros_like(step), torch.zeros_like(sigma)
        again = is_differentiated_again(grad)
        for k, share in drawn:
            own = step * scales[k], sigma * scales[k]
            if ctx.needs_input_grad[3]:
                d_shares[k] = torch.sum(grad * quantize_to_grid(x, *own, rings[k]))
            of_x, of_step, of_sigma = (backward_again if again else kernel.backward)(x, grad, *own, rings[k])
            # A share that is learned has a second derivative with what it is a share of.
            part = shares[k] if again else share
            d_x.append(of_x * part if again else _times(of_x, share))
            d_step += of_step * scales[k] * part
            d_sigma += of_sigma * scales[k] * part
        return _sum(d_x), d_step, d_sigma, d_shares, None, None


def _times(term: Tensor, share: float) -> Tensor:
    return term if share == 1 else term.mul_(share)


def _sum(terms: Any) -> Tensor:
    """Added up in the first one's place."""
    terms = iter(terms)
    total = next(terms)
    for term in terms:
        total += term
    return total
