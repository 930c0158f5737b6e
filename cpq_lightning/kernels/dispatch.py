"""Quantization to a grid without dropped bits, and dispatch to the kernel of a device."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cpq_lightning.functional.categorical import Estimator
from cpq_lightning.functional.grid import doubled, level_bounds
from cpq_lightning.functional.modes import is_transformed
from cpq_lightning.kernels import cpu, cuda
from cpq_lightning.kernels import cpu_build as library
from cpq_lightning.kernels.layout import has_dense_rows

# The estimators that kernels compute. Any other is computed in PyTorch operations.
ESTIMATORS: tuple[Estimator, ...] = ("argmax", "expectation")
_DTYPES = {"cpu": cpu.DTYPES, "cuda": cuda.DTYPES}


class QuantGrid(NamedTuple):
    """A grid with all levels of its width (no bit is dropped), and a gradient estimator.

    Attributes:
        bits: The width.
        doubled_zero_point: Twice the zero point: an integer for every grid, as compiled code has trouble with floats.
        expectation: Whether the estimator is ``expectation``; ``False`` means ``argmax``.
    """

    bits: int
    doubled_zero_point: int
    expectation: bool

    @classmethod
    def of(cls, bits: int, zero_point: float, estimator: Estimator) -> QuantGrid:
        """The grid of a width."""
        return cls(bits, doubled(zero_point), estimator == "expectation")

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest level, in units of the scale."""
        return level_bounds(self.bits, self.doubled_zero_point / 2)

    @property
    def settings(self) -> dict[str, Any]:
        """The grid as arguments of :func:`~cpq_lightning.functional.categorical.quantize_unchecked`."""
        estimator = "expectation" if self.expectation else "argmax"
        return {"bits": self.bits, "zero_point": self.doubled_zero_point / 2, "estimator": estimator}


class Choice(NamedTuple):
    """The implementation that quantizes a tensor, and the reasons against the others.

    Attributes:
        implementation: ``"cpu"`` (compiled C), ``"triton"`` or ``"functional"`` (PyTorch operations).
        reasons: For each of the other two, at least one reason in words.
    """

    implementation: Literal["cpu", "triton", "functional"]
    reasons: dict[str, list[str]]


def choose(
    x: Tensor,
    scales: int = 1,
    dim: int = 0,
    masked: bool = False,
    estimator: str = "expectation",
    device: str | None = None,
) -> Choice:
    """The implementation that quantizes a tensor like x; nothing is computed.

    Args:
        x: A tensor of the dtype, shape and strides in question; on the meta device if ``device`` is given.
        scales: Number of scales, 1 or the length of dimension ``dim``.
        dim: Dimension of the scales.
        masked: Whether there are DropBits masks that are learned, or of which one is not 1.
        estimator: The gradient estimator.
        device: Type of the device in question, such as ``"cuda"``; ``None`` means that of x.

    Example:
        >>> choose(torch.empty(2), device="xla").reasons["cpu"]
        ['kernels for cpu do not run on xla']
    """
    device = device or x.device.type
    reasons = {
        kernel: not_supported_reasons(x, scales, dim, masked, estimator, device)
        if device == runs_on
        else [f"kernels for {runs_on} do not run on {device}"]
        for kernel, runs_on in (("cpu", "cpu"), ("triton", "cuda"))
    }
    for kernel in ("cpu", "triton"):
        if not reasons[kernel]:
            others = {name: against for name, against in reasons.items() if name != kernel}
            return Choice(kernel, {**others, "functional": ["a kernel computes the same values in one pass"]})
    return Choice("functional", reasons)


def has_kernel(x: Tensor, scales: int, dim: int = 0, masked: bool = False, estimator: str = "expectation") -> bool:
    """Whether a kernel of its device can quantize x, with float32 scales: :func:`choose` in a forward."""
    return not not_supported_reasons(x, scales, dim, masked, estimator, x.device.type)


def not_supported_reasons(x: Tensor, scales: int, dim: int, masked: bool, estimator: str, device: str) -> list[str]:
    """The reasons why no kernel of the device can quantize x; none if one does. The arguments are those of
    :func:`choose`.
    """
    # Other tensors, and tensors in a transform, may not be asked for more.
    if type(x) not in (Tensor, torch.nn.Parameter):
        return [f"kernels take tensors, and this is a {type(x).__name__}"]
    if torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None:
        return ["an exported program must run without this package's operators"]
    if is_transformed():
        return ["torch.func and forward-mode differentiation transform PyTorch operations only"]
    reasons = []
    if not x.numel():
        reasons.append("the tensor is empty")
    if estimator not in ESTIMATORS:
        reasons.append(f"kernels compute the estimators {' and '.join(ESTIMATORS)}, and this is {estimator}")
    if masked:
        reasons.append("kernels quantize to the full grid, and masks drop bits of it or are learned")
    if scales > 1:
        if dim != 0 or x.dim() == 0 or scales != x.shape[0]:
            reasons.append("kernels take one scale, or one for each row (dimension 0)")
        elif not has_dense_rows(x):
            reasons.append("the rows of the tensor have gaps in memory, or are not in order")
    if (unavailable := _unavailable(device, x.dtype)) is not None:
        reasons.append(unavailable)
    return reasons


@torch.compiler.assume_constant_result
def _unavailable(device: str, dtype: torch.dtype) -> str | None:
    """Why the device has no kernel for the dtype; compiled code keeps the answer from its compilation."""
    if device not in _DTYPES:
        return f"there are kernels for cpu and cuda devices, and none for {device}"
    if dtype not in _DTYPES[device]:
        return f"kernels for {device} take {' and '.join(map(str, _DTYPES[device]))}, and the tensor is {dtype}"
    return library.unavailable() if device == "cpu" else _cuda_unavailable()


def _cuda_unavailable() -> str | None:
    return cuda.unavailable() if library.is_enabled() else library.SWITCHED_OFF


def describe() -> str:
    """Which computation runs on each device, and why: one line per device."""
    lines = [library.describe()]
    if torch.cuda.is_available():
        reason = _cuda_unavailable()
        lines.append(f"GPU: functional, in PyTorch operations ({reason})" if reason else "GPU: kernels in Triton")
    return "\n".join(lines)


def forward(x: Tensor, scale: Tensor, grid: QuantGrid) -> Tensor:
    """The nearest level of ``grid`` times the scale, in one pass over memory.

    A contiguous x may have one scale for each of several equal parts of a row: kernels take its elements in order.
    """
    if torch.compiler.is_compiling():
        return _forward_op(x, scale, grid.bits, grid.doubled_zero_point)
    return _forward(x, scale, grid)


def backward(
    x: Tensor, grad: Tensor, scale: Tensor, sigma: Tensor, grid: QuantGrid, overwrite: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in x, scale and sigma from the gradient in the result of :func:`forward`, in one pass over memory. With
    ``overwrite``, the gradient in x may be written into the memory of ``grad``.
    """
    if torch.compiler.is_compiling():
        return _backward_op(x, grad, scale, sigma, *grid)
    return _backward(x, grad, scale, sigma, grid, overwrite)


def _forward(x: Tensor, scale: Tensor, grid: QuantGrid) -> Tensor:
    return (cpu if x.is_cpu else cuda).forward(x, scale, *grid.bounds)


def _backward(
    x: Tensor, grad: Tensor, scale: Tensor, sigma: Tensor, grid: QuantGrid, overwrite: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    others = grad, scale, sigma, *grid.bounds, grid.expectation
    return cpu.backward(x, *others, overwrite=overwrite) if x.is_cpu else cuda.backward(x, *others)


@torch.library.custom_op("cpq_lightning::quantize", mutates_args=())
def _forward_op(x: Tensor, scale: Tensor, bits: int, doubled_zero_point: int) -> Tensor:
    return _forward(x, scale, QuantGrid(bits, doubled_zero_point, expectation=True))


@_forward_op.register_fake
def _(x: Tensor, scale: Tensor, bits: int, doubled_zero_point: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("cpq_lightning::quantize_backward", mutates_args=())
def _backward_op(
    x: Tensor, grad: Tensor, scale: Tensor, sigma: Tensor, bits: int, doubled_zero_point: int, expectation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(x, grad, scale, sigma, QuantGrid(bits, doubled_zero_point, expectation))


@_backward_op.register_fake
def _(x: Tensor, grad: Tensor, scale: Tensor, sigma: Tensor, *grid: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), scale.new_empty(scale.shape), sigma.new_empty(sigma.shape)
