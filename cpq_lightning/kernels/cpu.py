"""Forward and backward of one ring on a CPU, by the compiled library: one pass over memory each."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from cpq_lightning.kernels.cpu_build import built
from cpq_lightning.kernels.layout import dense_in_memory

# Elements that one thread works on at a time; sums of gradients are made chunk by chunk, so that they do not depend on
# the number of threads.
_CHUNK = 2**16
# What tensors may hold; everything is computed in float32.
DTYPES = (torch.float32, torch.bfloat16)


def forward(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """``step * clamp(round(x / step), low, high)``, laid out in memory as x is.

    Args:
        x: Float32 or bfloat16, any shape.
        step: Float32, one value, or one for each row (dimension 0) of an x in which row follows row in memory.
        low: Lowest level.
        high: Highest level.
    """
    dense, steps = dense_in_memory(x), step.contiguous()
    out = torch.empty_like(dense)
    _library().cpq_forward(
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
    d_step, d_sigma = torch.empty_like(steps), torch.empty_like(steps)
    done = _library().cpq_backward(
        dense.data_ptr(), g.data_ptr(), steps.data_ptr(), sigmas.data_ptr(), dx.data_ptr(), d_step.data_ptr(),
        d_sigma.data_ptr(), x.numel(), x.numel() // step.numel(), _CHUNK, low, high, expectation,
        x.dtype == torch.bfloat16,
    )  # fmt: skip
    if not done:
        raise MemoryError(f"There is no memory for the sums over {step.numel()} rows of the gradient in the steps.")
    return dx, d_step, d_sigma


def chain(
    d_step: Tensor, d_sigma: Tensor, saved: tuple[Tensor, ...], root: float, noise_min: float
) -> tuple[Tensor, Tensor]:
    """Gradients in ``log_scale`` and ``noise_logit`` from those in step and sigma.

    Args:
        d_step: Gradient in the step, float32, one-dimensional.
        d_sigma: That in sigma.
        saved: Start, bend, step, p, sigma, each like d_step, and temperature, one value.
        root: The square root in LSQ's scale.
        noise_min: The smallest noise, in steps.
    """
    d_log_scale, d_logit = torch.empty_like(saved[0]), torch.empty_like(saved[0])
    tensors = [t.contiguous() for t in (d_step, d_sigma, *saved)]
    pointers = [t.data_ptr() for t in (*tensors, d_log_scale, d_logit)]
    _library().cpq_chain(*pointers, len(d_log_scale), root, noise_min)
    return d_log_scale, d_logit


def _library() -> ctypes.CDLL:
    """What was begun with kernels ends with them, also where they have been switched off meanwhile."""
    library = built()
    assert library is not None
    return library
