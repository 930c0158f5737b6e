"""Forward and backward of a quantizer on a CPU, in the compiled library: one pass over memory each."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from cpq_lightning.kernels.cpu_build import built
from cpq_lightning.kernels.layout import dense_in_memory

# Elements that one thread computes at a time. Gradients are summed chunk by chunk, so that sums do not depend on the
# number of threads.
_CHUNK = 2**16
# Supported dtypes of tensors; all computation is in float32.
DTYPES = (torch.float32, torch.bfloat16)


def forward(x: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
    """The level nearest to ``x / scale``, times the scale, in the memory format of x.

    Args:
        x: Float32 or bfloat16, any shape.
        scale: The scale, float32: one value, or one for each row (dimension 0) of an x whose rows are contiguous and in
            order in memory, or for each of several equal parts of a row of a contiguous x.
        low: Lowest level: a whole number, or of a balanced grid a half-integer.
        high: Highest level.
    """
    dense, scales = dense_in_memory(x), scale.contiguous()
    out = torch.empty_like(dense)
    _library().cpq_forward(
        dense.data_ptr(), scales.data_ptr(), out.data_ptr(), x.numel(), x.numel() // scale.numel(), _CHUNK, low, high,
        x.dtype == torch.bfloat16,
    )  # fmt: skip
    return out


def backward(
    x: Tensor,
    grad: Tensor,
    scale: Tensor,
    sigma: Tensor,
    low: float,
    high: float,
    expectation: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to x, scale and sigma, from the gradient with respect to the forward's result.

    Args:
        x: As in :func:`forward`.
        grad: The incoming gradient, same shape and dtype as x.
        scale: As in :func:`forward`.
        sigma: Scale parameter of the noise, same shape as scale.
        low: Lowest level.
        high: Highest level.
        expectation: Whether the estimator is ``expectation``; ``False`` means ``argmax``.
        overwrite: Whether x's gradient may be written into the memory of ``grad``.

    Raises:
        MemoryError: the memory for the sums could not be allocated.
    """
    dense = dense_in_memory(x)
    # The kernel iterates over memory, so both need the same strides.
    same_strides = grad.stride() == dense.stride()
    g = grad if same_strides else torch.empty_like(dense).copy_(grad)
    dx = g if overwrite or not same_strides else torch.empty_like(dense)
    scales, sigmas = scale.contiguous(), sigma.contiguous()
    d_scale, d_sigma = torch.empty_like(scales), torch.empty_like(scales)
    succeeded = _library().cpq_backward(
        dense.data_ptr(), g.data_ptr(), scales.data_ptr(), sigmas.data_ptr(), dx.data_ptr(), d_scale.data_ptr(),
        d_sigma.data_ptr(), x.numel(), x.numel() // scale.numel(), _CHUNK, low, high, expectation,
        x.dtype == torch.bfloat16,
    )  # fmt: skip
    if not succeeded:
        raise MemoryError(f"Out of memory for the sums of the gradients in the scales of {scale.numel()} rows.")
    return dx, d_scale, d_sigma


def chain(
    d_scale: Tensor, d_sigma: Tensor, saved: tuple[Tensor, ...], root: float, noise_min: float
) -> tuple[Tensor, Tensor]:
    """Chain rule from the gradients with respect to scale and sigma to those with respect to ``log_scale`` and
    ``noise_logit``.

    Args:
        d_scale: Gradient in the scale, float32, one-dimensional.
        d_sigma: Gradient in sigma, same shape.
        saved: Start, bend, scale, p and sigma, each of the shape of d_scale, and temperature, one value.
        root: The square root in LSQ's gradient scale.
        noise_min: The smallest noise, in units of the scale.
    """
    d_log_scale, d_logit = torch.empty_like(saved[0]), torch.empty_like(saved[0])
    tensors = [t.contiguous() for t in (d_scale, d_sigma, *saved)]
    pointers = [t.data_ptr() for t in (*tensors, d_log_scale, d_logit)]
    _library().cpq_chain(*pointers, len(d_log_scale), root, noise_min)
    return d_log_scale, d_logit


def _library() -> ctypes.CDLL:
    """The compiled library, even if kernels were switched off since the forward: its backward needs them."""
    library = built()
    assert library is not None
    return library
