"""The CPQ quantizer: a categorical distribution over the grid and its multi-class straight-through estimator.

Lee, Yun, Hwang, Yang, *Cluster-Promoting Quantization with Bit-Drop for Minimizing Network Quantization
Loss*, ICCV 2021 (arXiv 2109.02100), on the parametrization of Louizos et al., *Relaxed Quantization*, ICLR
2019 (arXiv 1810.01875). The closed form, the nesting of the masks and the ``expectation`` estimator are
this project's.

With noise ``Logistic(0, sigma)`` on ``x`` and ``S`` the logistic function, level ``n`` of a grid with step
``a`` has the mass of its cell

    p_n = S((n + 1/2 - x/a) / s) - S((n - 1/2 - x/a) / s),     s = sigma / a,

and the probability ``pi_n = m_n p_n / Z``, ``Z = sum_j m_j p_j``, with ``m_n`` the mask of the ring that
``n`` lies in. The forward value is ``a * argmax_n pi_n``.

How it stays cheap. Masks of nested grids ``G_k`` do not increase outwards, so

    Z = sum_k (m_k - m_(k+1)) M_k,     M_k = mass of G_k, one contiguous interval,

is a sum of positive terms, one a ring, and the mean ``E = sum_n n pi_n`` is the same mixture of the means of
truncated logistics: ``truncated.py`` has one of them, ``mixture.py`` their sum. Every derivative is collected as two
moments over the cell boundaries ``t``, ``k0 = sum_t dy/dz_t`` and ``k1 = sum_t (t - n) dy/dz_t`` with
``z_t = (t - u) / s`` and ``u = x / a``; the chain rule to ``x``, ``step`` and ``sigma`` is then the same three lines
for both estimators. Nothing has size ``numel * 2**bits``.

These derivatives are what an estimator makes up, and are held constant where a backward is differentiated again: a
second derivative has what the gradient that comes in brings, and none of their own slope.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from cpq_lightning.functional.grid import check_bits, nested_bounds
from cpq_lightning.functional.mixture import (
    Mixture,
    argmax_moments,
    expectation_moments,
    mask_derivatives,
    mask_of,
    mixture_mean,
)
from cpq_lightning.functional.modes import is_transformed
from cpq_lightning.functional.truncated import PRECISIONS

Estimator = Literal["argmax", "expectation"]

# In steps; exp(-_FAR) is far below the rounding of float64.
_FAR = 64


def quantize(
    x: Tensor,
    step: Tensor,
    sigma: Tensor,
    masks: Tensor | None = None,
    *,
    bits: int,
    min_bits: int | None = None,
    signed: bool = True,
    estimator: Estimator = "argmax",
) -> Tensor:
    """Quantize to the most probable grid point, with the multi-class straight-through estimator as gradient.

    Forward ``x_hat = step * argmax_n pi_n``; with all masks 1 that is ``step * clamp(round(x / step))``.
    Backward, through ``x_hat = sum_n r_n step n`` with ``r`` the one-hot argmax: ``argmax`` (the paper's, as we
    read it) hands ``r``'s gradient to the chosen ``pi`` only, ``expectation`` (ours) to every ``pi``, which is the
    gradient of ``E[step n]``. ``step`` also receives the direct term ``n``.

    Args:
        x: Full-precision values, any shape, any floating dtype. Halves are computed in float32.
        step: Distance between levels, > 0, in the unit of ``x``; broadcasts to ``x``.
        sigma: Scale of the logistic noise, in the unit of ``x``, ``0 < sigma <= step``; broadcasts to ``x``.
        masks: DropBits masks in [0, 1], shape ``(bits - min_bits + 1, *shape)`` with ``shape`` broadcasting to
            ``x``; innermost ring first, the first one 1, not increasing. ``None`` means all 1.
        bits: Width of the widest grid, 1-8.
        min_bits: Width of the innermost ring, 1 to ``bits``; ``None`` means ``bits`` (one ring).
        signed: Whether the grid holds negative levels.
        estimator: ``"argmax"`` or ``"expectation"``.

    Returns:
        A tensor like ``x`` whose values lie on the grid.

    Raises:
        TypeError: ``x`` is not floating point, or ``bits`` not a whole number.
        ValueError: a width outside 1-8, ``min_bits > bits``, an unknown estimator, a shape that does not
            broadcast to ``x``, masks of the wrong count or order, ``step <= 0`` or ``sigma`` outside ``(0, step]``.

    Example:
        >>> x = torch.tensor([-0.9, 0.1, 0.26, 2.0])
        >>> quantize(x, torch.tensor(0.25), torch.tensor(0.08), bits=3)
        tensor([-1.0000,  0.0000,  0.2500,  0.7500])
    """
    min_bits = bits if min_bits is None else min_bits
    _check(x, step, sigma, masks, bits, min_bits, estimator)
    return quantize_unchecked(x, step, sigma, masks, bits=bits, min_bits=min_bits, signed=signed, estimator=estimator)


def quantize_unchecked(
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
    """:func:`quantize` for callers that guarantee its conditions: reads no value back from the device."""
    if is_transformed():
        if torch._C._is_tracing():
            return _nearest(x, step, sigma, masks, bits, min_bits, signed)
        return _linear(x, step, sigma, masks, bits, min_bits, signed, estimator)
    return _Quantize.apply(x, step, sigma, masks, bits, min_bits, signed, estimator)  # type: ignore[no-any-return]


def _check(
    x: Tensor, step: Tensor, sigma: Tensor, masks: Tensor | None, bits: int, min_bits: int, estimator: str
) -> None:
    check_bits("bits", bits)
    check_bits("min_bits", min_bits)
    if min_bits > bits:
        raise ValueError(f"min_bits must be at most bits={bits}, got {min_bits}.")
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator must be one of {get_args(Estimator)}, got {estimator!r}.")
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}; convert it with x.float().")
    for name, value in (("step", step), ("sigma", sigma)):
        if not _broadcasts(value.shape, x.shape):
            raise ValueError(f"{name} must broadcast to x of shape {tuple(x.shape)}, got {tuple(value.shape)}.")
    if masks is not None:
        rings = bits - min_bits + 1
        if masks.shape[:1] != (rings,) or not _broadcasts(masks.shape[1:], x.shape):
            raise ValueError(
                f"masks must have shape ({rings}, *what broadcasts to {tuple(x.shape)}), one mask for each of the "
                f"rings of {min_bits} to {bits} bits, got {tuple(masks.shape)}."
            )
    if torch.compiler.is_compiling():
        return
    with torch.no_grad():
        if not (step > 0).all():
            raise ValueError(f"step must be positive everywhere, got a minimum of {step.min().item():.4g}.")
        if not ((sigma > 0) & (sigma <= step)).all():
            raise ValueError(
                "sigma must be positive and at most step everywhere (a wider noise says nothing about the grid): "
                f"clamp it with torch.minimum(sigma, step). Got sigma up to {sigma.max().item():.4g} for steps from "
                f"{step.min().item():.4g}."
            )
        if masks is not None and not ((masks[0] == 1).all() and (masks[1:] <= masks[:-1]).all() and (masks >= 0).all()):
            raise ValueError(
                "masks must start with 1 and not increase outwards: build them as cumulative products of the gates, "
                "with cpq_lightning.functional.masks_from_gates."
            )


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    try:
        return torch.broadcast_shapes(shape, to) == to
    except RuntimeError:
        return False


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        step: Tensor,
        sigma: Tensor,
        masks: Tensor | None,
        bits: int,
        min_bits: int,
        signed: bool,
        estimator: Estimator,
    ) -> Tensor:
        ctx.save_for_backward(x, step, sigma, masks)
        ctx.grid = (bits, min_bits, signed, estimator)
        return _nearest(x, step, sigma, masks, bits, min_bits, signed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, step, sigma, masks = ctx.saved_tensors
        of_masks = ctx.needs_input_grad[3]
        found = _slopes(x, step, sigma, masks, *ctx.grid, of_masks=of_masks)
        d_masks = None
        if of_masks and found.masks is None:
            d_masks = torch.zeros_like(masks)
        elif found.masks is not None:
            g = _computable(grad)
            d_masks = torch.stack([_reduce(g * d, like) for d, like in zip(found.masks, masks, strict=True)])
        return (*_pulled_back(grad, found, x, step, sigma), d_masks, None, None, None, None)


def _nearest(
    x: Tensor, step: Tensor, sigma: Tensor, masks: Tensor | None, bits: int, min_bits: int, signed: bool
) -> Tensor:
    """The most probable level times the step."""
    bounds = nested_bounds(bits, min_bits, signed)
    a = _computable(step)
    u = _in_steps(x, a, bounds)
    n = _argmax_level(u, _computable(sigma) / a, _effective(masks, u), bounds)
    return (n * a).to(x.dtype)


def quantize_backward(
    grad: Tensor, x: Tensor, step: Tensor, sigma: Tensor, *, bits: int, signed: bool, estimator: Estimator
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`quantize`, one ring, in x, step and sigma: linear in ``grad``, and differentiable in it."""
    return _pulled_back(grad, _slopes(x, step, sigma, None, bits, bits, signed, estimator), x, step, sigma)


class _Slopes(NamedTuple):
    """The most probable level, and an estimator's derivatives of ``x_hat``, each of the shape of x."""

    level: Tensor
    x: Tensor
    step: Tensor
    sigma: Tensor
    masks: list[Tensor] | None


def _slopes(
    x: Tensor,
    step: Tensor,
    sigma: Tensor,
    masks: Tensor | None,
    bits: int,
    min_bits: int,
    signed: bool,
    estimator: Estimator,
    of_masks: bool = False,
) -> _Slopes:
    x, step, sigma = x.detach(), step.detach(), sigma.detach()
    bounds = nested_bounds(bits, min_bits, signed)
    a = _computable(step)
    u, s = _in_steps(x, a, bounds), _computable(sigma) / a
    m = _effective(None if masks is None else masks.detach(), u)
    n = _argmax_level(u, s, m, bounds)
    mixture = Mixture.of(u, s, m, bounds)
    if estimator == "argmax":
        k0, k1 = argmax_moments(u, s, n, mixture, None if m is None else mask_of(n, m, bounds))
    else:
        inner = [part.inner_boundaries(s) for part in mixture.parts]
        mean = mixture_mean(n, mixture, inner)
        k0, k1 = expectation_moments(n, mixture, inner, mean)

    # z_t = (t - u)/s: dz/dx = -1/sigma, dz/dstep = t/sigma, dz/dsigma = -z/sigma, and y is in units of the step.
    d_x = -k0 / s
    d_step = n + (n * k0 + k1) / s
    d_sigma = -(k1 - torch.where(mixture.near, (u - n) * k0, 0.0)) / (s * s)
    d_masks = None
    if m is not None and of_masks:
        rings = mask_derivatives(u, s, n, mixture, m, bounds, of_mean=estimator == "expectation")
        d_masks = [a * d for d in rings]
    return _Slopes(n, d_x, d_step, d_sigma, d_masks)


def _pulled_back(grad: Tensor, found: _Slopes, *likes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    g = _computable(grad)
    d_x, d_step, d_sigma = (_reduce(g * d, like) for d, like in zip(found[1:4], likes, strict=True))
    return d_x, d_step, d_sigma


def _linear(x: Tensor, step: Tensor, sigma: Tensor, masks: Tensor | None, *grid: Any) -> Tensor:
    """What :class:`_Quantize` computes, for whoever differentiates operations: the value, and slopes times changes that
    are zero.
    """
    found = _slopes(x, step, sigma, masks, *grid, of_masks=masks is not None)
    change = found.x * _change(x) + found.step * _change(step) + found.sigma * _change(sigma)
    if masks is not None and found.masks is not None:
        change = sum((d * _change(m) for d, m in zip(found.masks, masks.unbind(), strict=True)), start=change)
    return (found.level * _computable(step.detach())).to(x.dtype) + change.to(x.dtype)


def _change(t: Tensor) -> Tensor:
    """Zero, with the derivative 1."""
    t = _computable(t)
    # What is infinite has a level too.
    return (t - t.detach()).nan_to_num()


def _computable(t: Tensor) -> Tensor:
    """Halves in float32: their eight or eleven bits of mantissa cannot hold a cell's mass."""
    return t if t.dtype in PRECISIONS else t.float()


def _in_steps(x: Tensor, a: Tensor, bounds: list[tuple[int, int]]) -> Tensor:
    """x in steps, held within _FAR of the widest grid.

    Beyond that only ratios of masses matter, and they have reached their limit (noise is at most a step wide), while
    the distances from a huge x to two levels would round to the same number.
    """
    low, high = bounds[-1]
    return (_computable(x) / a).clamp(low - _FAR, high + _FAR)


def _effective(masks: Tensor | None, u: Tensor) -> Tensor | None:
    """A single ring's mask is 1 and cancels in pi: it has neither effect nor gradient."""
    return None if masks is None or len(masks) == 1 else masks.to(u.dtype)


def _reduce(grad: Tensor, like: Tensor) -> Tensor:
    return grad.sum_to_size(like.shape).to(like.dtype)


def _argmax_level(u: Tensor, s: Tensor, masks: Tensor | None, bounds: list[tuple[int, int]]) -> Tensor:
    """The most probable level. In a ring p falls with |n - u|, so each ring has one candidate, its nearest point."""
    nearest = u.round()
    if masks is None:
        return nearest.clamp(*bounds[-1])
    level = nearest.clamp(*bounds[0])
    best = _log_cell((level - u).abs(), s)
    for (low, high), mask in zip(bounds[1:], masks[1:], strict=True):
        # Nearest in the whole grid G_k: if that lies in a ring further in, it has been seen there, with a larger mask.
        candidate = nearest.clamp(low, high)
        # The sum has the layout of its first term; at equal scores the outer candidate is what rounding chose.
        score = _log_cell((candidate - u).abs(), s) + mask.to(u.dtype).log()
        better = score >= best
        level = torch.where(better, candidate, level)
        best = torch.where(better, score, best)
    return level


def _log_cell(distance: Tensor, s: Tensor) -> Tensor:
    """log p_n, but for a term that all cells share: S(B) - S(A) = S(B) S(-A) (1 - exp(A - B))."""
    # F.logsigmoid would lose the layout in memory; where softplus takes over its argument, exp(-40) is rounding.
    return -F.softplus((distance - 0.5) / s, threshold=40) - F.softplus((-0.5 - distance) / s, threshold=40)
