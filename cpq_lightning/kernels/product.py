"""A convolution or linear product of quantized tensors as one operation that saves neither of them for backward.

An ordinary convolution of a quantized weight and a quantized activation saves both: 1.7 times the memory of full
precision. This operation saves the unquantized input, which the operation that computed it saves anyway, and the
Parameter. It quantizes both again in backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cpq_lightning.functional.modes import is_differentiated_again
from cpq_lightning.kernels import dispatch as kernel
from cpq_lightning.kernels.dispatch import QuantGrid
from cpq_lightning.kernels.fused import backward_again, quantize_to_grid


class Operand(NamedTuple):
    """One operand of a product.

    Attributes:
        value: The unquantized tensor.
        scale: The scale, one value, one for each row (dimension 0), or, if the tensor is contiguous, one for each of
            several equal parts of a row; ``None`` if the operand is not quantized.
        sigma: Scale parameter of the noise, same shape as ``scale``.
        grid: The grid.
    """

    value: Tensor
    scale: Tensor | None = None
    sigma: Tensor | None = None
    grid: QuantGrid | None = None


class Convolution(NamedTuple):
    """Stride, padding, dilation and groups of a convolution, each as :func:`torch.nn.functional.conv2d` takes it."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def product(x: Operand, weight: Operand, bias: Tensor | None, convolution: Convolution | None) -> Tensor:
    """The linear product, or convolution, of the two quantized operands.

    Args:
        x: The input, of shape (..., in), or (batch, channels, *spatial) for a convolution.
        weight: The weight, of shape (out, in), or that of a convolution's weight.
        bias: One value per output channel.
        convolution: Geometry of the convolution; ``None`` for a linear product.

    Returns:
        The result of :func:`torch.nn.functional.linear`, or of the convolution with as many spatial dimensions, of the
        quantized tensors, also under autocast. Values and gradients are bit-exact.
    """
    device = x.value.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return _Product.apply(  # type: ignore[no-any-return]
        x.value,
        weight.value,
        bias,
        x.scale,
        x.sigma,
        weight.scale,
        weight.sigma,
        x.grid,
        weight.grid,
        convolution,
        dtype,
    )


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x_scale: Tensor | None,
        x_sigma: Tensor | None,
        weight_scale: Tensor | None,
        weight_sigma: Tensor | None,
        x_grid: QuantGrid | None,
        weight_grid: QuantGrid | None,
        convolution: Convolution | None,
        dtype: torch.dtype | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, x_scale, x_sigma, weight_scale, weight_sigma)
        ctx.bias = None if bias is None else bias.dtype
        ctx.settings = x_grid, weight_grid, convolution, dtype
        if torch.compiler.is_compiling():
            settings = _plain(x_grid), _plain(weight_grid), _plain(convolution), dtype
            return _forward_op(x, weight, bias, x_scale, weight_scale, *settings)
        return _forward(x, weight, bias, x_scale, weight_scale, x_grid, weight_grid, convolution, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, x_scale, x_sigma, weight_scale, weight_sigma = ctx.saved_tensors
        x_grid, weight_grid, convolution, dtype = ctx.settings
        x_needs, weight_needs, bias_needs, *x_settings_need, scale_needs, sigma_needs = ctx.needs_input_grad[:7]
        needs = [x_needs or any(x_settings_need), weight_needs or scale_needs or sigma_needs, bias_needs]
        if is_differentiated_again(grad):
            operands = Operand(x, x_scale, x_sigma, x_grid), Operand(weight, weight_scale, weight_sigma, weight_grid)
            (d_x, d_weight), d_bias = _backward_again(grad, operands, convolution, dtype, needs)
            d_bias = None if d_bias is None else d_bias.to(ctx.bias)
            return d_x[0], d_weight[0], d_bias, *d_x[1:], *d_weight[1:], None, None, None, None
        tensors = grad, x, weight, x_scale, x_sigma, weight_scale, weight_sigma
        if torch.compiler.is_compiling():
            settings = _plain(x_grid), _plain(weight_grid), _plain(convolution), dtype, needs
            gradients = iter(_backward_op(*tensors, *settings))
        else:
            gradients = iter(_backward(*tensors, x_grid, weight_grid, convolution, dtype, needs))
        d_x, d_x_scale, d_x_sigma = _next_gradients(gradients, needs[0], x_grid)
        d_weight, d_weight_scale, d_weight_sigma = _next_gradients(gradients, needs[1], weight_grid)
        d_bias = next(gradients).to(ctx.bias) if needs[2] else None
        return d_x, d_weight, d_bias, d_x_scale, d_x_sigma, d_weight_scale, d_weight_sigma, None, None, None, None


def _next_gradients(
    gradients: Iterator[Tensor], needed: bool, grid: QuantGrid | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients in one operand's value, scale and sigma."""
    if not needed:
        return None, None, None
    return (next(gradients), None, None) if grid is None else (next(gradients), next(gradients), next(gradients))


def _plain(settings: QuantGrid | Convolution | None) -> list[int]:
    """Integers for a custom operator: ``[]`` for ``None``, and the lists of a convolution concatenated."""
    if isinstance(settings, Convolution):
        return [*settings.stride, *settings.padding, *settings.dilation, settings.groups]
    return [] if settings is None else [int(value) for value in settings]


def _grid(values: list[int]) -> QuantGrid | None:
    """The inverse of :func:`_plain`."""
    return QuantGrid(values[0], values[1], bool(values[2])) if values else None


def _geometry(values: list[int]) -> Convolution | None:
    """The inverse of :func:`_plain`."""
    dims = len(values) // 3
    stride, padding, dilation = (tuple(values[i * dims : (i + 1) * dims]) for i in range(3))
    return Convolution(stride, padding, dilation, values[-1]) if values else None


def _quantized(x: Tensor, scale: Tensor | None, grid: QuantGrid | None, dtype: torch.dtype | None) -> Tensor:
    out = x if scale is None or grid is None else kernel.forward(x, scale, grid)
    return out if dtype is None else out.to(dtype)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    x_grid: QuantGrid | None,
    weight_grid: QuantGrid | None,
    convolution: Convolution | None,
    dtype: torch.dtype | None,
) -> Tensor:
    x = _quantized(x, x_scale, x_grid, dtype)
    weight = _quantized(weight, weight_scale, weight_grid, dtype)
    bias = bias if bias is None or dtype is None else bias.to(dtype)
    return _multiplied(x, weight, bias, convolution)


def _multiplied(x: Tensor, weight: Tensor, bias: Tensor | None, convolution: Convolution | None) -> Tensor:
    if convolution is None:
        rows = F.linear(x.flatten(0, -2), weight, bias)
        # Not a view: autograd forbids in-place changes of a view that a Function returns (x = layer(x); x += y).
        return torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], len(weight)])  # type: ignore[no-any-return]
    stride, padding, dilation, groups = convolution
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    x_sigma: Tensor | None,
    weight_scale: Tensor | None,
    weight_sigma: Tensor | None,
    x_grid: QuantGrid | None,
    weight_grid: QuantGrid | None,
    convolution: Convolution | None,
    dtype: torch.dtype | None,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients that are needed: in x, its scale and sigma; in the weight, its scale and sigma; in the bias."""
    d_x, d_weight, d_bias = _product_backward(
        grad,
        _quantized(x, x_scale, x_grid, dtype),
        _quantized(weight, weight_scale, weight_grid, dtype),
        convolution,
        needs,
    )
    gradients = _operand_backward(d_x, x, x_scale, x_sigma, x_grid)
    gradients += _operand_backward(d_weight, weight, weight_scale, weight_sigma, weight_grid)
    return gradients if d_bias is None else [*gradients, d_bias]


def _product_backward(
    grad: Tensor, x: Tensor, weight: Tensor, convolution: Convolution | None, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if convolution is not None:
        stride, padding, dilation, groups = convolution
        gradients = torch.ops.aten.convolution_backward(
            grad, x, weight, [len(weight)], stride, padding, dilation, False, [0] * len(stride), groups, needs
        )
        # oneDNN returns the weight's gradient even if only the bias's is requested.
        return tuple(g if needed else None for g, needed in zip(gradients, needs, strict=True))  # type: ignore[return-value]
    # Not flatten: it has no batching rule for is_grads_batched.
    rows = grad.reshape(-1, grad.shape[-1])
    return (
        (rows @ weight).reshape(x.shape) if needs[0] else None,
        rows.t() @ x.reshape(-1, x.shape[-1]) if needs[1] else None,
        rows.sum(0) if needs[2] else None,
    )


def _operand_backward(
    grad: Tensor | None, x: Tensor, scale: Tensor | None, sigma: Tensor | None, grid: QuantGrid | None
) -> list[Tensor]:
    """Backward of one operand's quantizer."""
    if grad is None:
        return []
    grad = grad.to(x.dtype)
    if scale is None or sigma is None or grid is None:
        return [grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)]
    # Nothing else refers to this gradient, so its memory can be reused.
    return list(kernel.backward(x, grad, scale, sigma, grid, overwrite=True))


def _backward_again(
    grad: Tensor,
    operands: Sequence[Operand],
    convolution: Convolution | None,
    dtype: torch.dtype | None,
    needs: list[bool],
) -> tuple[list[tuple[Tensor | None, ...]], Tensor | None]:
    """:func:`_backward` in operations that are differentiable in ``grad`` and in the quantized operands.

    Returns:
        For each operand its gradients in value, scale and sigma; and the gradient in the bias.
    """
    quantized = [
        op.value if op.grid is None else quantize_to_grid(op.value, op.scale, op.sigma, op.grid)  # type: ignore[arg-type]
        for op in operands
    ]
    x, weight = quantized if dtype is None else (value.to(dtype) for value in quantized)
    *d_operands, d_bias = _product_backward(grad, x, weight, convolution, needs)
    gradients: list[tuple[Tensor | None, ...]] = []
    for d, op in zip(d_operands, operands, strict=True):
        if d is None or op.grid is None:
            gradients.append((None if d is None else d.to(op.value.dtype), None, None))
            continue
        gradients.append(backward_again(op.value, d.to(op.value.dtype), op.scale, op.sigma, op.grid))  # type: ignore[arg-type]
    return gradients, d_bias


@torch.library.custom_op("cpq_lightning::product", mutates_args=())
def _forward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    x_grid: list[int],
    weight_grid: list[int],
    convolution: list[int],
    dtype: torch.dtype | None,
) -> Tensor:
    settings = _grid(x_grid), _grid(weight_grid), _geometry(convolution)
    return _forward(x, weight, bias, x_scale, weight_scale, *settings, dtype)


@_forward_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
    *_, convolution, dtype = settings
    return _forward(x, weight, bias, None, None, None, None, _geometry(convolution), dtype)


@torch.library.custom_op("cpq_lightning::product_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    x_sigma: Tensor | None,
    weight_scale: Tensor | None,
    weight_sigma: Tensor | None,
    x_grid: list[int],
    weight_grid: list[int],
    convolution: list[int],
    dtype: torch.dtype | None,
    needs: list[bool],
) -> list[Tensor]:
    tensors = grad, x, weight, x_scale, x_sigma, weight_scale, weight_sigma
    return _backward(*tensors, _grid(x_grid), _grid(weight_grid), _geometry(convolution), dtype, needs)


@_backward_op.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, *settings: Any) -> list[Tensor]:
    x_scale, x_sigma, weight_scale, weight_sigma, *_, needs = settings
    gradients = []
    for value, needed, scale, sigma in (
        (x, needs[0], x_scale, x_sigma),
        (weight, needs[1], weight_scale, weight_sigma),
    ):
        if needed:
            gradients.append(torch.empty_like(value))
        if needed and scale is not None:
            gradients += [torch.empty_like(scale), torch.empty_like(sigma)]
    return [*gradients, grad.new_empty(len(weight))] if needs[2] else gradients
