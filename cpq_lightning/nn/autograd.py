"""Operations with a custom gradient, or one cheaper than that of autograd."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cpq_lightning.functional.modes import is_differentiated_again, is_transformed
from cpq_lightning.functional.saliency import bit_saliency
from cpq_lightning.kernels.cpu import chain
from cpq_lightning.kernels.dispatch import has_kernel


def _constants() -> tuple[float, float]:
    """The range of the log-scale and the minimum noise, as literals: ``torch.compile(dynamic=True)`` treats a global
    float as dynamic, and cannot pass that to an autograd.Function.
    """
    # log 1000: the scale stays within a factor of 1000 of its initial value. That is far more than training needs, and
    # no learning rate can make the scale zero, negative, or overflow float32.
    return 6.907755278982137, 0.02


SCALE_REACH, NOISE_MIN = _constants()
# Number of samples of a batch from which the bit saliency of an activation is estimated.
_SAMPLES = 8
# With more elements than this, the saliency of a weight is estimated from some of its channels, but at least this many.
_ELEMENTS, _CHANNELS = 2**15, 64


def noise_logit(s: float) -> float:
    """The parameter at which ``sigma / (T · scale)`` is ``s``, between NOISE_MIN and 1."""
    p = (s - NOISE_MIN) / (1 - NOISE_MIN)
    return math.log(p / (1 - p))


class ScaleAndSigma(torch.autograd.Function):
    """The scale and the noise ``sigma`` of a quantizer from its two parameters, as one autograd node.

    ``scale = start exp(R tanh(log_scale / R))`` and ``sigma = scale s T``, with ``s`` from NOISE_MIN to 1 by a sigmoid.
    Gradients are multiplied by ``1 / (start root)``, with the root of ``size`` in LSQ's gradient scale: see
    :class:`~cpq_lightning.nn.Quantizer`. A float in place of ``size`` would be an input of the graph wherever
    torch.compile sees several of them, which it cannot give to a Function.
    """

    @staticmethod
    def forward(
        ctx: Any, log_scale: Tensor, noise_logit: Tensor, start: Tensor, temperature: Tensor, size: int
    ) -> tuple[Tensor, Tensor]:
        bend, scale, p, sigma = _scale_and_sigma(log_scale, noise_logit, start, temperature)
        ctx.save_for_backward(log_scale, noise_logit, start, bend, scale, p, sigma, temperature)
        ctx.size = size
        return scale, sigma

    @staticmethod
    def backward(ctx: Any, d_scale: Tensor, d_sigma: Tensor) -> tuple[Tensor | None, ...]:
        log_scale, noise_logit, *saved = ctx.saved_tensors
        start, bend, scale, p, sigma, temperature = saved
        again, root = is_differentiated_again(d_scale), math.sqrt(ctx.size)
        # A third-party mixed precision may have cast the parameters.
        are_float32 = all(t.is_cpu and t.dtype == torch.float32 for t in (d_scale, d_sigma, *saved))
        if are_float32 and not again and not torch.compiler.is_compiling() and has_kernel(start, 1):
            return *chain(d_scale, d_sigma, tuple(saved), root, NOISE_MIN), None, None, None
        if again:
            parameters = _scaled(log_scale, noise_logit, start, root)
            bend, scale, p, sigma = _scale_and_sigma(*parameters, start, temperature)
        factor = 1 / (start * root)
        d_log_scale = (d_scale * scale + d_sigma * sigma) * (1 - bend * bend) * factor
        d_logit = d_sigma * scale * temperature * (p * (1 - p)) * ((1 - _constants()[1]) * factor)
        return d_log_scale, d_logit, None, None, None


def scale_and_sigma(
    log_scale: Tensor, noise_logit: Tensor, start: Tensor, temperature: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Apply :class:`ScaleAndSigma`; under ``torch.func`` its equations in differentiable operations."""
    if not is_transformed():
        return ScaleAndSigma.apply(log_scale, noise_logit, start, temperature, size)  # type: ignore[no-any-return]
    _, scale, _, sigma = _scale_and_sigma(*_scaled(log_scale, noise_logit, start, math.sqrt(size)), start, temperature)
    return scale, sigma


def _scale_and_sigma(
    log_scale: Tensor, noise_logit: Tensor, start: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tanh in the scale, the scale, the sigmoid in sigma, and sigma."""
    reach, noise_min = _constants()
    bend = torch.tanh(log_scale / reach)
    scale = start * torch.exp(reach * bend)
    p = torch.sigmoid(noise_logit)
    return bend, scale, p, scale * (noise_min + (1 - noise_min) * p) * temperature


def _scaled(log_scale: Tensor, noise_logit: Tensor, start: Tensor, root: float) -> tuple[Tensor, Tensor]:
    """The parameters, with their gradients multiplied by ``1 / (start root)``."""
    first, second = (p.detach() + (p - p.detach()) / (start * root) for p in (log_scale, noise_logit))
    return first, second


class SaliencyToGates(torch.autograd.Function):
    """Identity on the quantized tensor; the backward pass gives each gate logit minus the saliency of its bit
    (:func:`~cpq_lightning.functional.saliency.bit_saliency`) as gradient, and 0 if the gate was closed.

    A closed gate reports 0 since the loss without the bit may be far away, and its gradient then describes that point.
    With a loss scaled by S the saliency is S² times as large. Saliencies are constants under double backward.

    Args:
        out: The quantized tensor.
        x: The tensor before quantization.
        logits: Logits of the gates, shape (gates, rows).
        is_open: Whether each gate was open, broadcast to the logits.
        scales: Scale of each width, the narrowest first, shape (gates + 1, 1 or channels), or (gates + 1, channels,
            groups) for an ``x`` of shape (channels, groups, elements).
        widths: Bits of each width.
        doubled_zero_points: Twice the zero point of each width.
        channel_dim: Dimension of the channels.
        samples: Whether ``x`` is a batch of samples instead of a weight.
    """

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x: Tensor, logits: Tensor, is_open: Tensor, scales: Tensor,
        widths: tuple[int, ...], doubled_zero_points: tuple[int, ...], channel_dim: int, samples: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, is_open, scales)
        ctx.settings = widths, doubled_zero_points, channel_dim, samples, logits.shape[1] > 1
        return out[...]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, is_open, scales = ctx.saved_tensors
        widths, doubled_zero_points, channel_dim, samples, by_block = ctx.settings
        x, grad_x = torch.atleast_1d(x), torch.atleast_1d(grad.detach())
        blocks = 0 if samples else channel_dim % x.dim()
        sampled = slice(None, None, 1 if by_block else _stride(x, blocks, samples))
        index = (*[slice(None)] * blocks, sampled)
        part, part_grad = x[index], grad_x[index]
        part_scales = scales if scales.shape[1] == 1 else scales[:, sampled]
        saliency = bit_saliency(
            part, part_grad, part_scales, widths,
            zero_points=[twice / 2 for twice in doubled_zero_points], channel_dim=channel_dim, blocks=blocks,
            by_block=by_block,
        )  # fmt: skip
        share = x.numel() / max(1, part.numel())
        # A bit that nothing depends on: below any other, but above the 0 of a closed gate. Not a global constant: with
        # torch.compile(dynamic=True) that is an input of the graph, which the backward of a Function cannot have.
        least_saliency = 1e-30
        grad_logits = torch.where(is_open, -share * saliency.clamp(min=least_saliency), 0.0)
        return grad, None, grad_logits, None, None, None, None, None, None


def _stride(x: Tensor, blocks: int, samples: bool) -> int:
    """The stride over the blocks of a tensor from which a saliency common to all blocks is estimated."""
    if samples:
        return max(1, len(x) // _SAMPLES)
    return max(1, min(x.numel() // _ELEMENTS, x.shape[blocks] // _CHANNELS))


class Connect(torch.autograd.Function):
    """Identity on ``x`` that puts the parameters into its graph, with zero gradients.

    DistributedDataParallel requires a gradient of every parameter in every step, also while nothing is quantized.
    """

    @staticmethod
    def of(x: Tensor, *parameters: Tensor) -> Tensor:
        """Apply the function if gradients are enabled; transforms of ``torch.func`` do not need it."""
        if is_transformed():
            return x
        # A view of a Parameter requires a gradient even under no_grad, and cannot get one.
        return Connect.apply(x, *parameters) if torch.is_grad_enabled() else x.detach()

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        # view_as would change the strides of dimensions of size 1, by which kernels are selected.
        return x[...]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like]
        return (grad, *zeros)
