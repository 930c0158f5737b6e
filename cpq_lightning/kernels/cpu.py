"""Forward and backward of one ring on a CPU, by the compiled library: one pass over memory each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cpq_lightning.kernels.library import library

# Elements that one thread works on at a time; sums of gradients are made chunk by chunk, so that they do not depend on
# the number of threads.
_CHUNK = 2**16


@torch.compiler.assume_constant_result
def computes(dtype: torch.dtype) -> bool:
    """Whether the library is there and knows the type; compiled code keeps the answer that it was compiled with."""
    return dtype in (torch.float32, torch.bfloat16) and library() is not None


def forward(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """``step * clamp(round(x / step), low, high)``, laid out in memory as x is.

    Args:
        x: Float32 or bfloat16, any shape.
        step: Float32, one value, or one for each row (dimension 0) of an x that is contiguous.
        low: Lowest level.
        high: Highest level.
    """
    dense, steps = dense_in_memory(x), step.contiguous()
    out = torch.empty_like(dense)
    kernels = library()
    assert kernels is not None
    kernels.cpq_forward(
        dense.data_ptr(), steps.data_ptr(), out.data_ptr(), x.numel(), x.numel() // step.numel(), _CHUNK, low, high,
        x.dtype == torch.bfloat16,
    )  # fmt: skip
    return out


def backward(
    x: Tensor,
    grad: Tensor,
    step: Tensor,
    sigma: Tensor,
    low: int,
    high: int,
    expectation: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in x, step and sigma, from that in the forward's result.

    Args:
        x: As in :func:`forward`.
        grad: Like x.
        step: As in :func:`forward`.
        sigma: Scale of the noise, like step.
        low: Lowest level.
        high: Highest level.
        expectation: Of which estimator; ``False`` means ``argmax``.
        overwrite: Whether x's gradient may take the place of ``grad``.
    """
    dense = dense_in_memory(x)
    # Both are walked through in memory: they must lie in it alike.
    fits = grad.stride() == dense.stride()
    g = grad if fits else torch.empty_like(dense).copy_(grad)
    dx = g if overwrite or not fits else torch.empty_like(dense)
    steps, sigmas = step.contiguous(), sigma.contiguous()
    rows, n = step.numel(), x.numel()
    sums = torch.zeros(math.ceil(n / _CHUNK), rows, 2, dtype=torch.float64)
    kernels = library()
    assert kernels is not None
    kernels.cpq_backward(
        dense.data_ptr(), g.data_ptr(), steps.data_ptr(), sigmas.data_ptr(), dx.data_ptr(), sums.data_ptr(),
        n, n // rows, _CHUNK, low, high, expectation, x.dtype == torch.bfloat16,
    )  # fmt: skip
    total = sums.sum(0) if len(sums) > 1 else sums[0]
    # Each in memory of its own, as operators of torch return it.
    d_step, d_sigma = (total[:, k].to(step.dtype).reshape(step.shape) for k in range(2))
    return dx, d_step, d_sigma


def dense_in_memory(x: Tensor) -> Tensor:
    """x, or a copy of it, whose elements lie in memory without gaps or overlaps, in any order."""
    if x.is_contiguous():
        return x
    same = torch.empty_like(x)
    return x if same.stride() == x.stride() else same.copy_(x)
