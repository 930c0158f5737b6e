"""The quantizer's forward and backward on a CUDA device: one read and one write of each element in each direction.

The kernels are those of ``triton_kernels``, which is imported and compiled at the first use: Triton is installed with
PyTorch for CUDA only, and :func:`unavailable` gives the reason if that fails. The host reads no values of tensors, and
the division of work depends on shapes only. So sums are reproducible, and launches can be captured in a CUDA graph once
a first launch has compiled each variant.
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cpq_lightning.kernels.layout import dense_in_memory

log = logging.getLogger("cpq_lightning")

# Supported dtypes of tensors; all computation is in float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Elements that a program computes at a time: four per thread. More would not fit into the registers in backward.
_TILE = 512
_WARP = 32 * 4
# Maximum number of programs: many per multiprocessor of a large device, but few partial sums.
_PROGRAMS = 16384


def forward(x: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
    """Quantize each value to its nearest level: that nearest to ``x / scale``, times the scale.

    Args:
        x: At least one value, any shape and strides, one of :data:`DTYPES`.
        scale: The scale, > 0, in the unit of ``x``; one value, or one for each of the ``len(x)`` rows, or for each of
            several equal parts of a row of a contiguous x.
        low: Lowest level, in units of the scale: a whole number, or of a balanced grid a half-integer.
        high: Highest level, in units of the scale.

    Returns:
        A tensor like ``x``, equal to functional's result; NaN stays NaN, and no zero is negative.
    """
    x, a = _dense(x, scale), scale.contiguous()
    out = torch.empty_like(x)
    launch, options = _division(x, a)
    with torch.cuda.device_of(x):
        _kernels().forward[launch](x, a, out, float(low), float(high), **options)
    return out


def backward(
    x: Tensor, grad: Tensor, scale: Tensor, sigma: Tensor, low: float, high: float, expectation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in ``x``, ``scale`` and ``sigma`` from the gradient in the result of :func:`forward`.

    Args:
        x: Values, as for :func:`forward`.
        grad: Gradient of the loss in the result of forward, shape and dtype of ``x``, any strides.
        scale: The scale, as for :func:`forward`.
        sigma: Scale parameter of the noise, ``0 < sigma <= scale``, in the unit of ``x``, shape of ``scale``.
        low: Lowest level, in units of the scale.
        high: Highest level, in units of the scale.
        expectation: Whether the estimator is ``"expectation"``; ``False`` means ``"argmax"``.

    Returns:
        The three gradients, with the shapes and dtypes of ``x``, ``scale`` and ``sigma``.
    """
    x, a, noise = _dense(x, scale), scale.contiguous(), sigma.contiguous()
    # The kernel iterates over memory, so both need the same strides.
    grad = grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)
    dx = torch.empty_like(x)
    launch, options = _division(x, a)
    sums = torch.empty((2, a.numel(), launch[0] // a.numel()), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _kernels().backward[launch](
            x, grad, a, noise, dx, sums, float(low), float(high), EXPECTATION=expectation, **options
        )
    # Two separate sums, as results of a custom operator must not share memory.
    d_scale, d_sigma = (part.sum(-1) for part in sums)
    return dx, d_scale.to(scale.dtype).view(scale.shape), d_sigma.to(sigma.dtype).view(sigma.shape)


def unavailable() -> str | None:
    """Reason why the kernels cannot be used, or ``None`` if a trial launch gave correct results."""
    if torch.version.hip is not None:
        return "this PyTorch is for ROCm, and the kernels are for CUDA"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if not _tried.cache_info().currsize and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured, and the kernels have not been compiled before"
    return _tried()


@cache
def _tried() -> str | None:
    try:
        _kernels()
        x, a = torch.tensor([-9.0, 0.3, 0.75], device="cuda"), torch.tensor([0.5], device="cuda")
        out = forward(x, a, -4, 3).tolist()
        grads = [grad.isfinite().all().item() for grad in backward(x, x, a, a, -4, 3, True)]
        reason = (
            None
            if out == [-2.0, 0.5, 1.0] and all(grads)
            else f"Triton's compiler gave {out} instead of [-2.0, 0.5, 1.0]"
        )
    # Any error (no Triton, no host compiler, an unsupported GPU) means that functional computes.
    except Exception as error:
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    log.info("CPQ kernels on CUDA: %s", reason or "compiled by Triton")
    return reason


def _dense(x: Tensor, scale: Tensor) -> Tensor:
    """x, or a copy of it, without gaps or overlaps in memory; with one scale per row, rows in order."""
    if x.is_contiguous():
        return x
    if scale.numel() > 1:
        in_rows = x.stride(0) == x.numel() // len(x)
        return x if in_rows and torch.empty_like(x, device="meta").stride() == x.stride() else x.contiguous()
    return dense_in_memory(x)


def _division(x: Tensor, scale: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """The launch grid (number of programs) and kernel options. Each program computes a number of tiles of one row."""
    rows = scale.numel()
    length = x.numel() // rows
    tile = max(_WARP, min(_TILE, 1 << (length - 1).bit_length()))
    tiles = -(-length // tile)
    tiles_each = min(tiles, -(-tiles * rows // _PROGRAMS))
    programs = -(-tiles // tiles_each)
    options = {"length": length, "programs": programs, "tiles": tiles_each, "TILE": tile, "num_warps": tile // _WARP}
    return (rows * programs,), options


@cache
def _kernels() -> ModuleType:
    """The module of the Triton kernels."""
    import cpq_lightning.kernels.triton_kernels as kernels

    return kernels
