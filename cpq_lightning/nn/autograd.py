"""Operations whose gradient autograd would not find, or not as cheaply."""

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
    """The reach of a step and the least noise, as literals: ``torch.compile(dynamic=True)`` takes a global float for
    one that may change, and cannot hand that to an autograd.Function.
    """
    # log 1000: a step can move by a factor of 1000 from where it was fitted. That is far more than training ever asks
    # for, and no learning rate can take it to zero, below zero, or out of float32.
    return 6.907755278982137, 0.02


STEP_REACH, NOISE_MIN = _constants()
# What a bit is worth that nothing depends on: less than any other, more than one that was not there.
_LEAST = 1e-30
# Samples of a batch that tell what the bits of an activation are worth.
_SAMPLES = 8
# Of a weight with more elements than this some channels do, but no fewer than these.
_ELEMENTS, _CHANNELS = 2**15, 64


def noise_logit(s: float) -> float:
    """The parameter at which sigma over T times the step is ``s``, between NOISE_MIN and 1."""
    p = (s - NOISE_MIN) / (1 - NOISE_MIN)
    return math.log(p / (1 - p))


class StepAndSigma(torch.autograd.Function):
    """A quantizer's step and noise from its two parameters, as one node of the graph.

    ``step = start exp(R tanh(log_scale / R))`` and ``sigma = step s T``, ``s`` from NOISE_MIN to 1 by a sigmoid.
    Gradients are multiplied by ``1 / (start root)``, ``root`` the square root in LSQ's scale: see
    :class:`~cpq_lightning.nn.Quantizer`.
    """

    @staticmethod
    def forward(
        ctx: Any, log_scale: Tensor, noise_logit: Tensor, start: Tensor, temperature: Tensor, root: float
    ) -> tuple[Tensor, Tensor]:
        bend, step, p, sigma = _step_and_sigma(log_scale, noise_logit, start, temperature)
        ctx.save_for_backward(log_scale, noise_logit, start, bend, step, p, sigma, temperature)
        ctx.root = root
        return step, sigma

    @staticmethod
    def backward(ctx: Any, d_step: Tensor, d_sigma: Tensor) -> tuple[Tensor | None, ...]:
        log_scale, noise_logit, *saved = ctx.saved_tensors
        start, bend, step, p, sigma, temperature = saved
        again = is_differentiated_again(d_step)
        # Someone's mixed precision may have cast the parameters.
        whole = all(t.is_cpu and t.dtype == torch.float32 for t in (d_step, d_sigma, *saved))
        if whole and not again and not torch.compiler.is_compiling() and has_kernel(start, 1):
            return *chain(d_step, d_sigma, tuple(saved), ctx.root, NOISE_MIN), None, None, None
        if again:
            parameters = _scaled(log_scale, noise_logit, start, ctx.root)
            bend, step, p, sigma = _step_and_sigma(*parameters, start, temperature)
        scale = 1 / (start * ctx.root)
        d_log_scale = (d_step * step + d_sigma * sigma) * (1 - bend * bend) * scale
        d_logit = d_sigma * step * temperature * (p * (1 - p)) * ((1 - _constants()[1]) * scale)
        return d_log_scale, d_logit, None, None, None


def step_and_sigma(
    log_scale: Tensor, noise_logit: Tensor, start: Tensor, temperature: Tensor, root: float
) -> tuple[Tensor, Tensor]:
    """:class:`StepAndSigma`; for ``torch.func`` in operations that it can look into."""
    if not is_transformed():
        return StepAndSigma.apply(log_scale, noise_logit, start, temperature, root)  # type: ignore[no-any-return]
    _, step, _, sigma = _step_and_sigma(*_scaled(log_scale, noise_logit, start, root), start, temperature)
    return step, sigma


def _step_and_sigma(
    log_scale: Tensor, noise_logit: Tensor, start: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The step, and with what it is bent; sigma, and the sigmoid in it."""
    reach, least = _constants()
    bend = torch.tanh(log_scale / reach)
    step = start * torch.exp(reach * bend)
    p = torch.sigmoid(noise_logit)
    return bend, step, p, step * (least + (1 - least) * p) * temperature


def _scaled(log_scale: Tensor, noise_logit: Tensor, start: Tensor, root: float) -> tuple[Tensor, Tensor]:
    """The parameters, whose gradient is multiplied by ``1 / (start root)``."""
    first, second = (p.detach() + (p - p.detach()) / (start * root) for p in (log_scale, noise_logit))
    return first, second


class SaliencyToGates(torch.autograd.Function):
    """What was quantized, as it is; instead of its gradient the logit of each gate gets minus what its bit is worth
    (:func:`~cpq_lightning.functional.saliency.bit_saliency`), and 0 where the bit was not there.

    Without a bit the loss may be far from where it was, and its gradient tells of that. Of a loss that is scaled by S
    the worth is S² times as large. Where a backward is differentiated again, worths are constants in it.

    Args:
        out: What was quantized.
        x: What it was before.
        logits: Of the gates, shape (gates, rows).
        there: Whether each was open, likewise.
        steps: Step of each width, the narrowest first, shape (gates + 1, 1 or channels).
        widths: Bits of each.
        signed: Whether grids hold negative levels.
        channel_dim: Dimension of the channels.
        samples: Whether ``x`` is a batch of samples instead of a weight.
    """

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x: Tensor, logits: Tensor, there: Tensor, steps: Tensor,
        widths: tuple[int, ...], signed: bool, channel_dim: int, samples: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, there, steps)
        ctx.settings = widths, signed, channel_dim, samples, logits.shape[1] > 1
        return out[...]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, there, steps = ctx.saved_tensors
        widths, signed, channel_dim, samples, by_block = ctx.settings
        x, of_x = torch.atleast_1d(x), torch.atleast_1d(grad.detach())
        blocks = 0 if samples else channel_dim % x.dim()
        some = slice(None, None, 1 if by_block else _stride(x, blocks, samples))
        index = (*[slice(None)] * blocks, some)
        own, of_own = x[index], of_x[index]
        of_own_steps = steps if steps.shape[1] == 1 else steps[:, some]
        worth = bit_saliency(
            own, of_own, of_own_steps, widths, signed, channel_dim=channel_dim, blocks=blocks, by_block=by_block
        )
        share = x.numel() / max(1, own.numel())
        of_logits = torch.where(there, -share * worth.clamp(min=_LEAST), 0.0)
        return grad, None, of_logits, None, None, None, None, None, None


def _stride(x: Tensor, blocks: int, samples: bool) -> int:
    """One in how many blocks of a tensor is looked at where all have the same bits: as many as tell enough."""
    if samples:
        return max(1, len(x) // _SAMPLES)
    return max(1, min(x.numel() // _ELEMENTS, x.shape[blocks] // _CHANNELS))


class Connect(torch.autograd.Function):
    """x itself, with the parameters in its graph at no cost.

    DistributedDataParallel requires that every parameter gets a gradient in every step, also while nothing is
    quantized.
    """

    @staticmethod
    def of(x: Tensor, *parameters: Tensor) -> Tensor:
        """Apply it, where gradients are wanted, and not by a transform, which knows of no such processes."""
        if is_transformed():
            return x
        # Without gradients a view of a Parameter would still ask for one, and have no way to it.
        return Connect.apply(x, *parameters) if torch.is_grad_enabled() else x.detach()

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        # Not view_as, which forgets strides of dimensions of size 1: kernels are chosen by them.
        return x[...]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like]
        return (grad, *zeros)
