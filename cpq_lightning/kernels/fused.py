"""Quantization with the fastest implementation for a tensor's device and dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpq_lightning.functional.categorical import Estimator, quantize_backward, quantize_unchecked
from cpq_lightning.functional.modes import is_differentiated_again, is_transformed
from cpq_lightning.kernels import dispatch as kernel
from cpq_lightning.kernels.dispatch import QuantGrid


def quantize(
    x: Tensor,
    scale: Tensor,
    sigma: Tensor,
    masks: Tensor | None,
    *,
    bits: int,
    min_bits: int,
    zero_point: float,
    estimator: Estimator,
) -> Tensor:
    """:func:`cpq_lightning.functional.quantize` without checks of its arguments.

    A kernel computes if there is one and no bit is dropped, with one read and one write of each element in forward and
    in backward. Its values are bit-exact to functional's, its gradients equal up to rounding. Otherwise functional
    computes.
    """
    if masks is not None and _all_open(masks):
        masks = None
    scales_fit = scale.dtype == sigma.dtype == torch.float32 and scale.shape == sigma.shape
    if scales_fit and kernel.has_kernel(x, scale.numel(), _scale_dim(x, scale), masks is not None, estimator):
        return quantize_to_grid(x, scale, sigma, QuantGrid.of(bits, zero_point, estimator))
    min_bits = min_bits if masks is not None else bits
    return quantize_unchecked(
        x, scale, sigma, masks, bits=bits, min_bits=min_bits, zero_point=zero_point, estimator=estimator
    )


def _scale_dim(x: Tensor, scale: Tensor) -> int:
    """0 if the scales lie along dimension 0, else -1."""
    return 0 if scale.dim() == x.dim() and scale.shape[:1].numel() == scale.numel() else -1


def _all_open(masks: Tensor) -> bool:
    """Whether all masks are 1 and constant; ``False`` where reading them would synchronize or is not possible."""
    if torch.compiler.is_compiling() or is_transformed() or masks.requires_grad or masks.device.type != "cpu":
        return False
    return bool((masks == 1).all())


def quantize_to_grid(x: Tensor, scale: Tensor, sigma: Tensor, grid: QuantGrid) -> Tensor:
    """:func:`quantize` to the grid ``grid`` for an x that has a kernel, with one scale or one for each row.

    A contiguous x may have one scale for each of several equal parts of a row.
    """
    return _Fused.apply(x, scale, sigma, grid)  # type: ignore[no-any-return]


def backward_again(
    x: Tensor, grad: Tensor, scale: Tensor, sigma: Tensor, grid: QuantGrid
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`cpq_lightning.kernels.dispatch.backward` in PyTorch operations, differentiable in ``grad``."""
    shape = x.shape
    if x.dim() and scale.numel() > len(x):
        # One scale for each of several parts of a row.
        x, grad = (t.reshape(scale.numel(), -1) for t in (x, grad))
    rows = [-1, *[1] * (x.dim() - 1)] if x.dim() else []
    d_x, *others = quantize_backward(grad, x, scale.reshape(rows), sigma.reshape(rows), **grid.settings)
    d_scale, d_sigma = (d.reshape(scale.shape) for d in others)
    return d_x.reshape(shape), d_scale, d_sigma


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, sigma: Tensor, grid: QuantGrid) -> Tensor:
        ctx.save_for_backward(x, scale, sigma)
        ctx.grid = grid
        return kernel.forward(x, scale, grid)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, sigma = ctx.saved_tensors
        if is_differentiated_again(grad):
            return *backward_again(x, grad, scale, sigma, ctx.grid), None
        return *kernel.backward(x, grad, scale, sigma, ctx.grid), None
