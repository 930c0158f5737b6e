"""Identities with a gradient of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ScaleGradient(torch.autograd.Function):
    """``t`` itself; its gradient is multiplied by ``scale``."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return grad * scale, None


class Connect(torch.autograd.Function):
    """x itself, with the parameters in its graph at no cost.

    DistributedDataParallel requires that every parameter gets a gradient in every step, also while nothing is
    quantized.
    """

    @staticmethod
    def of(x: Tensor, *parameters: Tensor) -> Tensor:
        """Apply it, where gradients are wanted."""
        return Connect.apply(x, *parameters) if torch.is_grad_enabled() else x[...]

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        # Not view_as, which forgets strides of dimensions of size 1: kernels are chosen by them.
        return x[...]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like]
        return (grad, *zeros)
