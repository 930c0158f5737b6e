"""A convolution or linear product of quantized tensors as one operation, which keeps neither of them for backward.

A convolution that is handed a quantized weight and a quantized activation keeps both: 1.7 times what full precision
keeps. This one keeps the unquantized input, which what made it keeps anyway, and the Parameter, and quantizes both
again in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cpq_lightning.functional.modes import is_differentiated_again
from cpq_lightning.kernels import dispatch as kernel
from cpq_lightning.kernels.dispatch import QuantGrid
from cpq_lightning.kernels.fused import backward_again, quantize_to_grid


class Operand(NamedTuple):
    """One side of a product.

    Attributes:
        value: The tensor as it is.
        step: What quantizes it, one value or one for each row (dimension 0); ``None`` where the product takes the
            tensor as it is.
        sigma: Scale of the noise, like step.
        ring: The levels.
    """

    value: Tensor
    step: Tensor | None = None
    sigma: Tensor | None = None
    ring: QuantGrid | None = None


class Convolution(NamedTuple):
    """Geometry of a convolution, as :func:`torch.nn.functional.conv2d` takes it."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def product(x: Operand, weight: Operand, bias: Tensor | None, convolution: Convolution | None) -> Tensor:
    """The linear product, or convolution, of what the two operands are quantized to.

    Args:
        x: Of shape (..., in), or (batch, channels, *places) for a convolution.
        weight: Of shape (out, in), or that of the convolution's weight.
        bias: One value a channel.
        convolution: Its geometry; ``None`` for a linear product.

    Returns:
        What :func:`torch.nn.functional.linear`, or the convolution of as many places, gives for the quantized tensors,
        under autocast too, to the bit; so are its gradients.
    """
    device = x.value.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return _Product.apply(  # type: ignore[no-any-return]
        x.value, weight.value, bias, x.step, x.sigma, weight.step, weight.sigma, x.ring, weight.ring, convolution, dtype
    )


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x_step: Tensor | None,
        x_sigma: Tensor | None,
        weight_step: Tensor | None,
        weight_sigma: Tensor | None,
        x_grid: QuantGrid | None,
        weight_grid: QuantGrid | None,
        convolution: Convolution | None,
        dtype: torch.dtype | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, x_step, x_sigma, weight_step, weight_sigma)
        ctx.bias = None if bias is None else bias.dtype
        ctx.settings = x_grid, weight_grid, convolution, dtype
        run = _forward_op if torch.compiler.is_compiling() else _forward
        return run(
            x, weight, bias, x_step, weight_step, _plain(x_grid), _plain(weight_grid), _plain(convolution), dtype
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, x_step, x_sigma, weight_step, weight_sigma = ctx.saved_tensors
        x_grid, weight_grid, convolution, dtype = ctx.settings
        x_needs, weight_needs, bias_needs, *of_x, step_needs, sigma_needs = ctx.needs_input_grad[:7]
        needs = [x_needs or any(of_x), weight_needs or step_needs or sigma_needs, bias_needs]
        if is_differentiated_again(grad):
            sides = Operand(x, x_step, x_sigma, x_grid), Operand(weight, weight_step, weight_sigma, weight_grid)
            (d_x, d_weight), d_bias = _backward_again(grad, sides, _plain(convolution), dtype, needs)
            d_bias = None if d_bias is None else d_bias.to(ctx.bias)
            return d_x[0], d_weight[0], d_bias, *d_x[1:], *d_weight[1:], None, None, None, None
        run = _backward_op if torch.compiler.is_compiling() else _backward
        found = iter(
            run(
                grad, x, weight, x_step, x_sigma, weight_step, weight_sigma, _plain(x_grid), _plain(weight_grid),
                _plain(convolution), dtype, needs,
            )
        )  # fmt: skip
        d_x, d_x_step, d_x_sigma = _of_side(found, needs[0], x_grid)
        d_weight, d_weight_step, d_weight_sigma = _of_side(found, needs[1], weight_grid)
        d_bias = next(found).to(ctx.bias) if needs[2] else None
        return d_x, d_weight, d_bias, d_x_step, d_x_sigma, d_weight_step, d_weight_sigma, None, None, None, None


def _of_side(found: Any, needed: bool, ring: QuantGrid | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if not needed:
        return None, None, None
    return (next(found), None, None) if ring is None else (next(found), next(found), next(found))


def _plain(settings: QuantGrid | Convolution | None) -> list[int]:
    """As an operator of torch takes them: ``[]`` for none, and a convolution's lists one after the other."""
    if isinstance(settings, Convolution):
        return [*settings.stride, *settings.padding, *settings.dilation, settings.groups]
    return [] if settings is None else [int(value) for value in settings]


def _geometry(convolution: list[int]) -> tuple[list[int], list[int], list[int], int]:
    places = len(convolution) // 3
    stride, padding, dilation = (convolution[i * places : (i + 1) * places] for i in range(3))
    return stride, padding, dilation, convolution[-1]


def _quantized(x: Tensor, step: Tensor | None, ring: list[int], dtype: torch.dtype | None) -> Tensor:
    out = x if step is None else kernel.forward(x, step, _ring(ring))
    return out if dtype is None else out.to(dtype)


def _ring(values: list[int]) -> QuantGrid:
    return QuantGrid(values[0], values[1], bool(values[2]))


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_step: Tensor | None,
    weight_step: Tensor | None,
    x_grid: list[int],
    weight_grid: list[int],
    convolution: list[int],
    dtype: torch.dtype | None,
) -> Tensor:
    x = _quantized(x, x_step, x_grid, dtype)
    weight = _quantized(weight, weight_step, weight_grid, dtype)
    bias = bias if bias is None or dtype is None else bias.to(dtype)
    return _multiplied(x, weight, bias, convolution)


def _multiplied(x: Tensor, weight: Tensor, bias: Tensor | None, convolution: list[int]) -> Tensor:
    if not convolution:
        rows = F.linear(x.flatten(0, -2), weight, bias)
        # Not a view: what a Function of autograd returns as a view may not be changed in place (x = layer(x); x += y).
        return torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], len(weight)])  # type: ignore[no-any-return]
    stride, padding, dilation, groups = _geometry(convolution)
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    x_step: Tensor | None,
    x_sigma: Tensor | None,
    weight_step: Tensor | None,
    weight_sigma: Tensor | None,
    x_grid: list[int],
    weight_grid: list[int],
    convolution: list[int],
    dtype: torch.dtype | None,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients in x (its step, its sigma), in the weight (likewise) and in the bias, of those that are needed."""
    d_x, d_weight, d_bias = _product_backward(
        grad,
        _quantized(x, x_step, x_grid, dtype),
        _quantized(weight, weight_step, weight_grid, dtype),
        convolution,
        needs,
    )
    found = _through(d_x, x, x_step, x_sigma, x_grid)
    found += _through(d_weight, weight, weight_step, weight_sigma, weight_grid)
    return found if d_bias is None else [*found, d_bias]


def _product_backward(
    grad: Tensor, x: Tensor, weight: Tensor, convolution: list[int], needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if convolution:
        stride, padding, dilation, groups = _geometry(convolution)
        found = torch.ops.aten.convolution_backward(
            grad, x, weight, [len(weight)], stride, padding, dilation, False, [0] * len(stride), groups, needs
        )
        # oneDNN gives the weight's gradient too where only the bias's is asked for.
        return tuple(g if needed else None for g, needed in zip(found, needs, strict=True))  # type: ignore[return-value]
    # Not flatten, for which the gradients of a batch at once (is_grads_batched) have no rule.
    rows = grad.reshape(-1, grad.shape[-1])
    return (
        (rows @ weight).reshape(x.shape) if needs[0] else None,
        rows.t() @ x.reshape(-1, x.shape[-1]) if needs[1] else None,
        rows.sum(0) if needs[2] else None,
    )


def _through(
    grad: Tensor | None, x: Tensor, step: Tensor | None, sigma: Tensor | None, ring: list[int]
) -> list[Tensor]:
    """Back through one operand's quantizer."""
    if grad is None:
        return []
    grad = grad.to(x.dtype)
    if step is None or sigma is None:
        return [grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)]
    # Nobody else has this gradient: its place is taken.
    return list(kernel.backward(x, grad, step, sigma, _ring(ring), overwrite=True))


def _backward_again(
    grad: Tensor, sides: Sequence[Operand], convolution: list[int], dtype: torch.dtype | None, needs: list[bool]
) -> tuple[list[tuple[Tensor | None, ...]], Tensor | None]:
    """:func:`_backward` in operations that can be differentiated: in ``grad``, and in what sides are quantized to.

    Returns:
        For each side its gradients in value, step and sigma; and the bias's.
    """
    quantized = [
        side.value if side.ring is None else quantize_to_grid(side.value, side.step, side.sigma, side.ring)  # type: ignore[arg-type]
        for side in sides
    ]
    x, weight = quantized if dtype is None else (value.to(dtype) for value in quantized)
    *of_sides, d_bias = _product_backward(grad, x, weight, convolution, needs)
    found: list[tuple[Tensor | None, ...]] = []
    for d, side in zip(of_sides, sides, strict=True):
        if d is None or side.ring is None:
            found.append((None if d is None else d.to(side.value.dtype), None, None))
            continue
        found.append(backward_again(side.value, d.to(side.value.dtype), side.step, side.sigma, side.ring))  # type: ignore[arg-type]
    return found, d_bias


_forward_op = torch.library.custom_op("cpq_lightning::product", _forward, mutates_args=())
_backward_op = torch.library.custom_op("cpq_lightning::product_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
    *_, convolution, dtype = settings
    return _forward(x, weight, bias, None, None, [], [], convolution, dtype)


@_backward_op.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, *settings: Any) -> list[Tensor]:
    x_step, x_sigma, weight_step, weight_sigma, *_, needs = settings
    found = []
    for value, needed, step, sigma in ((x, needs[0], x_step, x_sigma), (weight, needs[1], weight_step, weight_sigma)):
        if needed:
            found.append(torch.empty_like(value))
        if needed and step is not None:
            found += [torch.empty_like(step), torch.empty_like(sigma)]
    return [*found, grad.new_empty(len(weight))] if needs[2] else found
