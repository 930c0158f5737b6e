"""Quantization by the fastest computation that a tensor's device and type have."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cpq_lightning.functional import Estimator, level_bounds, quantize_unchecked
from cpq_lightning.kernels.library import library

# Elements that one thread works on at a time; sums of gradients are made chunk by chunk, so that they do not depend on
# the number of threads.
_CHUNK = 2**16


def quantize(
    x: Tensor,
    step: Tensor,
    sigma: Tensor,
    masks: Tensor | None,
    *,
    bits: int,
    min_bits: int,
    signed: bool,
    estimator: Estimator,
) -> Tensor:
    """:func:`cpq_lightning.functional.quantize` for callers that guarantee its conditions.

    On a CPU, in float32 and where no bit may be dropped, compiled kernels compute: one read and one write of each
    element each way, the same values to the bit, and gradients to rounding. Everything else is functional's.
    """
    if masks is not None and _all_open(masks):
        masks = None
    settings = {"bits": bits, "min_bits": min_bits if masks is not None else bits, "signed": signed}
    found = None if masks is not None else _kernels(x, step, sigma)
    if found is None:
        return quantize_unchecked(x, step, sigma, masks, estimator=estimator, **settings)
    return _Fused.apply(x, step, sigma, level_bounds(bits, signed), estimator, found)  # type: ignore[no-any-return]


def _all_open(masks: Tensor) -> bool:
    """Whether masks are 1 and not learned, where that can be read at no cost."""
    if torch.compiler.is_compiling() or masks.requires_grad or masks.device.type != "cpu":
        return False
    return bool((masks == 1).all())


def _kernels(x: Tensor, step: Tensor, sigma: Tensor) -> ctypes.CDLL | None:
    """The kernels, if they compute these tensors: one step, or one for each row of a tensor that is dense in memory."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or x.device.type != "cpu":
        return None
    if not x.numel() or not all(t.dtype == torch.float32 for t in (x, step, sigma)) or step.shape != sigma.shape:
        return None
    rows = step.numel()
    if rows > 1 and (step.dim() != x.dim() or step.shape[0] != rows or rows != x.shape[0] or not x.is_contiguous()):
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(x):  # type: ignore[attr-defined]
        return None
    return library()


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        step: Tensor,
        sigma: Tensor,
        bounds: tuple[int, int],
        estimator: Estimator,
        kernels: ctypes.CDLL,
    ) -> Tensor:
        ctx.save_for_backward(x, step, sigma)
        ctx.settings = bounds, estimator, kernels
        dense = _dense(x)
        out = torch.empty_like(dense)
        steps = step.detach().contiguous()
        length = x.numel() // step.numel()
        kernels.cpq_forward(dense.data_ptr(), steps.data_ptr(), out.data_ptr(), x.numel(), length, _CHUNK, *bounds)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, step, sigma = ctx.saved_tensors
        (low, high), estimator, kernels = ctx.settings
        dense = _dense(x)
        # Both are walked through in memory: they must lie in it alike.
        g = grad if grad.stride() == dense.stride() else torch.empty_like(dense).copy_(grad)
        dx = torch.empty_like(dense)
        steps, sigmas = step.contiguous(), sigma.contiguous()
        rows, n = step.numel(), x.numel()
        sums = torch.zeros(math.ceil(n / _CHUNK), rows, 2, dtype=torch.float64)

        kernels.cpq_backward(
            dense.data_ptr(), g.data_ptr(), steps.data_ptr(), sigmas.data_ptr(), dx.data_ptr(), sums.data_ptr(),
            n, n // rows, _CHUNK, low, high, estimator == "expectation",
        )  # fmt: skip
        d_step, d_sigma = (total.to(step.dtype).view_as(step) for total in sums.sum(0).unbind(-1))
        return dx, d_step, d_sigma, None, None, None


def _dense(x: Tensor) -> Tensor:
    """x, or a copy of it, whose elements lie in memory without gaps or overlaps, in any order."""
    if x.is_contiguous():
        return x
    same = torch.empty_like(x)
    return x if same.stride() == x.stride() else same.copy_(x)
