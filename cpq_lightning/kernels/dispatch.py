"""Quantization to a grid without dropped bits, and dispatch to the kernel of a device."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpq_lightning.functional.categorical import Estimator
from cpq_lightning.functional.grid import level_bounds
from cpq_lightning.functional.modes import is_transformed
from cpq_lightning.kernels import cpu
from cpq_lightning.kernels import cpu_build as library
from cpq_lightning.kernels import triton_kernels as gpu
from cpq_lightning.kernels.layout import has_dense_rows

# The estimators that kernels compute. Any other is computed in PyTorch operations.
ESTIMATORS: tuple[Estimator, ...] = ("argmax", "expectation")


class QuantGrid(NamedTuple):
    """A grid with all levels of its width (no bit is dropped), and a gradient estimator.

    Attributes:
        low: Lowest level, in units of the scale.
        high: Highest level, in units of the scale.
        expectation: Whether the estimator is ``expectation``; ``False`` means ``argmax``.
    """

    low: int
    high: int
    expectation: bool

    @classmethod
    def of(cls, bits: int, signed: bool, estimator: Estimator) -> QuantGrid:
        """The grid of a width."""
        return cls(*level_bounds(bits, signed), estimator == "expectation")

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of :meth:`of` that give this grid."""
        bits = (self.high - self.low + 1).bit_length() - 1
        return {"bits": bits, "signed": self.low < 0, "estimator": "expectation" if self.expectation else "argmax"}


def has_kernel(x: Tensor, rows: int) -> bool:
    """Whether a kernel can quantize x, with one float32 scale or one for each row of an x that is dense in memory."""
    if type(x) not in (Tensor, torch.nn.Parameter) or not x.numel():
        return False
    if torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None:
        # Exported programs must run without this package's custom operators.
        return False
    if is_transformed():
        return False
    if rows > 1 and (x.dim() == 0 or rows != x.shape[0] or not has_dense_rows(x)):
        return False
    return _computes(x.device.type, x.dtype)


@torch.compiler.assume_constant_result
def _computes(device: str, dtype: torch.dtype) -> bool:
    """Whether the device has kernels for the dtype; compiled code keeps the answer from its compilation."""
    if device == "cpu":
        return dtype in cpu.DTYPES and library.library() is not None
    return device == "cuda" and dtype in gpu.DTYPES and library.is_enabled() and gpu.unavailable() is None


def describe() -> str:
    """Which computation runs on each device, and why: one line per device."""
    lines = [library.describe()]
    if torch.cuda.is_available():
        reason = gpu.unavailable() if library.is_enabled() else "kernels are switched off"
        lines.append(f"GPU: functional, in PyTorch operations ({reason})" if reason else "GPU: kernels in Triton")
    return "\n".join(lines)


def forward(x: Tensor, step: Tensor, ring: QuantGrid) -> Tensor:
    """``step * clamp(round(x / step), low, high)`` of the grid ``ring``, in one pass over memory."""
    if torch.compiler.is_compiling():
        return _forward_op(x, step, ring.low, ring.high)
    return _forward(x, step, ring.low, ring.high)


def backward(
    x: Tensor, grad: Tensor, step: Tensor, sigma: Tensor, ring: QuantGrid, overwrite: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in x, step and sigma from the gradient in the result of :func:`forward`, in one pass over memory. With
    ``overwrite``, the gradient in x may be written into the memory of ``grad``.
    """
    if torch.compiler.is_compiling():
        return _backward_op(x, grad, step, sigma, *ring)
    return _backward(x, grad, step, sigma, *ring, overwrite=overwrite)


def _forward(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    return (cpu if x.is_cpu else gpu).forward(x, step, low, high)


def _backward(x: Tensor, *others: Any, overwrite: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    return cpu.backward(x, *others, overwrite=overwrite) if x.is_cpu else gpu.backward(x, *others)


@torch.library.custom_op("cpq_lightning::quantize", mutates_args=())
def _forward_op(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    return _forward(x, step, low, high)


@_forward_op.register_fake
def _(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("cpq_lightning::quantize_backward", mutates_args=())
def _backward_op(
    x: Tensor, grad: Tensor, step: Tensor, sigma: Tensor, low: int, high: int, expectation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(x, grad, step, sigma, low, high, expectation)


@_backward_op.register_fake
def _(x: Tensor, grad: Tensor, step: Tensor, sigma: Tensor, *grid: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), step.new_empty(step.shape), sigma.new_empty(sigma.shape)
