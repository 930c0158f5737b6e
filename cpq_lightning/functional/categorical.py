"""The CPQ quantizer: a categorical distribution over the grid and its multi-class straight-through estimator (STE).

Lee, Yun, Hwang, Yang, *Cluster-Promoting Quantization with Bit-Drop for Minimizing Network Quantization Loss*, ICCV
2021 (arXiv 2109.02100), with the parametrization of Louizos et al., *Relaxed Quantization*, ICLR 2019 (arXiv
1810.01875). The closed form, the nesting of the masks and the ``expectation`` estimator are ours.

With noise ``Logistic(0, sigma)`` on ``x`` and ``S`` the logistic function, level ``n`` of a grid with scale ``a`` (the
papers' step size) has the mass of its cell

    p_n = S((n + 1/2 - x/a) / s) - S((n - 1/2 - x/a) / s),     s = sigma / a,

and the probability ``pi_n = m_n p_n / Z``, ``Z = sum_j m_j p_j``, with ``m_n`` the mask of the narrowest nested grid
that contains ``n``. The forward value is ``a * argmax_n pi_n``.

Cost: no tensor has size ``numel * 2**bits``. Masks do not increase from the narrowest nested grid ``G_k`` to the
widest, so

    Z = sum_k (m_k - m_(k+1)) M_k,     M_k = mass of G_k, one contiguous interval,

is a sum of non-negative terms, one for each nested grid, and the mean ``E = sum_n n pi_n`` is the same mixture of the
means of truncated logistics (one component: ``truncated.py``; the mixture: ``mixture.py``). Every derivative is
computed from two moments over the cell boundaries ``t``, ``k0 = sum_t dy/dz_t`` and ``k1 = sum_t (t - n) dy/dz_t`` with
``z_t = (t - u) / s`` and ``u = x / a``. The chain rule to ``x``, ``scale`` and ``sigma`` is then the same three lines
for both estimators.

The estimator's derivatives are surrogates, so a double backward treats them as constants: second derivatives come from
the incoming gradient only.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cpq_lightning.functional.grid import check_bits, check_zero_point, doubled, half_step, nested_bounds
from cpq_lightning.functional.mixture import (
    Mixture,
    Surrogate,
    argmax_moments,
    expectation_moments,
    mask_derivatives,
)
from cpq_lightning.functional.modes import is_transformed
from cpq_lightning.functional.truncated import PRECISIONS

Estimator = Literal["argmax", "expectation"]
# What each estimator differentiates. Saved states contain the position of a name: append new ones.
ESTIMATORS: dict[Estimator, Surrogate] = {
    "argmax": Surrogate(argmax_moments, partial(mask_derivatives, of_mean=False)),
    "expectation": Surrogate(expectation_moments, partial(mask_derivatives, of_mean=True)),
}

# In units of the scale; exp(-_FAR) is far below the rounding error of float64.
_FAR = 64


def quantize(
    x: Tensor,
    scale: Tensor,
    sigma: Tensor,
    masks: Tensor | None = None,
    *,
    bits: int,
    min_bits: int | None = None,
    zero_point: float | None = None,
    estimator: Estimator = "expectation",
) -> Tensor:
    """Fake-quantize to the most probable level, with the multi-class straight-through estimator as gradient.

    Forward: ``x_hat = scale * argmax_n pi_n``; with all masks 1 that is ``scale * clamp(round(x / scale))``.
    Backward: ``x_hat = sum_n r_n scale n`` with ``r`` the one-hot argmax. ``argmax`` (the paper's, as we read it)
    passes the gradient in ``r`` to the chosen ``pi`` only, ``expectation`` (ours) to every ``pi``, which gives the
    gradient of ``E[scale n]``. ``scale`` also receives the direct term ``n``.

    Args:
        x: Full-precision values, any shape, any floating dtype. Float16 and bfloat16 are computed in float32.
        scale: The scale (distance between neighbouring levels), > 0, in the unit of ``x``; broadcasts to ``x``.
        sigma: Scale parameter of the logistic noise, in the unit of ``x``, ``0 < sigma <= scale``; broadcasts to ``x``.
        masks: DropBits masks in [0, 1], shape ``(bits - min_bits + 1, *shape)`` with ``shape`` broadcasting to ``x``:
            one for each width from ``min_bits`` to ``bits``, in this order. The mask of a width multiplies the levels
            that the width adds. The first one is 1 and they do not increase. ``None`` means all 1.
        bits: Width of the widest grid, 1-8.
        min_bits: Width of the narrowest nested grid, 1 to ``bits``; ``None`` means ``bits`` (a single grid).
        zero_point: The zero point z of the widest grid, whose levels are ``{-z … 2^bits - 1 - z}``: a whole number from
            0 (unsigned) to ``2^bits - 1``, or ``(2^bits - 1)/2`` for the balanced grid. ``None`` means ``2^(bits-1)``
            (signed). Narrower grids lie around the same zero.
        estimator: ``"argmax"`` or ``"expectation"``.

    Returns:
        A tensor like ``x`` whose values lie on the grid.

    Raises:
        TypeError: ``x`` is not floating point, or ``bits`` is not a whole number.
        ValueError: a width outside 1-8, ``min_bits > bits``, a zero point that the grid does not have, an unknown
            estimator, a shape that does not broadcast to ``x``, masks of the wrong count or order, ``scale <= 0``, or
            ``sigma`` outside ``(0, scale]``.

    Example:
        >>> x = torch.tensor([-0.9, 0.1, 0.26, 2.0])
        >>> quantize(x, torch.tensor(0.25), torch.tensor(0.08), bits=3)
        tensor([-1.0000,  0.0000,  0.2500,  0.7500])
    """
    min_bits = bits if min_bits is None else min_bits
    _check(x, scale, sigma, masks, bits, min_bits, estimator)
    z = check_zero_point(bits, zero_point)
    return quantize_unchecked(x, scale, sigma, masks, bits=bits, min_bits=min_bits, zero_point=z, estimator=estimator)


def quantize_unchecked(
    x: Tensor,
    scale: Tensor,
    sigma: Tensor,
    masks: Tensor | None,
    *,
    bits: int,
    min_bits: int,
    zero_point: float,
    estimator: Estimator,
) -> Tensor:
    """:func:`quantize` without checks of its arguments: causes no host-device synchronization."""
    if is_transformed():
        if torch._C._is_tracing():
            return _nearest(x, scale, sigma, masks, bits, min_bits, zero_point)
        return _linear(x, scale, sigma, masks, bits, min_bits, zero_point, estimator)
    twice = doubled(zero_point)
    return _Quantize.apply(x, scale, sigma, masks, bits, min_bits, twice, estimator)  # type: ignore[no-any-return]


def _check(
    x: Tensor, scale: Tensor, sigma: Tensor, masks: Tensor | None, bits: int, min_bits: int, estimator: str
) -> None:
    check_bits("bits", bits)
    check_bits("min_bits", min_bits)
    if min_bits > bits:
        raise ValueError(f"min_bits must be at most bits={bits}, got {min_bits}.")
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {tuple(ESTIMATORS)}, got {estimator!r}.")
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}; convert it with x.float().")
    for name, value in (("scale", scale), ("sigma", sigma)):
        if not _broadcasts(value.shape, x.shape):
            raise ValueError(f"{name} must broadcast to x of shape {tuple(x.shape)}, got {tuple(value.shape)}.")
    if masks is not None:
        grids = bits - min_bits + 1
        if masks.shape[:1] != (grids,) or not _broadcasts(masks.shape[1:], x.shape):
            raise ValueError(
                f"masks must have shape ({grids}, *shape), where shape broadcasts to {tuple(x.shape)}: one mask for "
                f"each nested grid of {min_bits} to {bits} bits. Got {tuple(masks.shape)}."
            )
    if torch.compiler.is_compiling():
        return
    with torch.no_grad():
        if not (scale > 0).all():
            raise ValueError(f"scale must be positive everywhere, got a minimum of {scale.min().item():.4g}.")
        if not ((sigma > 0) & (sigma <= scale)).all():
            raise ValueError(
                "sigma must be positive and at most scale everywhere: clamp it with torch.minimum(sigma, scale). Got "
                f"sigma up to {sigma.max().item():.4g} and scale from {scale.min().item():.4g} on."
            )
        if masks is not None and not ((masks[0] == 1).all() and (masks[1:] <= masks[:-1]).all() and (masks >= 0).all()):
            raise ValueError(
                "masks must be at least 0, start with 1 and not increase from the narrowest grid to the widest: build "
                "them from gates with cpq_lightning.functional.masks_from_gates."
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
        scale: Tensor,
        sigma: Tensor,
        masks: Tensor | None,
        bits: int,
        min_bits: int,
        doubled_zero_point: int,
        estimator: Estimator,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, sigma, masks)
        # Doubled, a zero point is an integer: compiled code cannot give a float to a Function.
        ctx.grid = (bits, min_bits, doubled_zero_point / 2, estimator)
        return _nearest(x, scale, sigma, masks, bits, min_bits, doubled_zero_point / 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, sigma, masks = ctx.saved_tensors
        with_masks = ctx.needs_input_grad[3]
        slopes = _slopes(x, scale, sigma, masks, *ctx.grid, with_masks=with_masks)
        d_masks = None
        if with_masks and slopes.masks is None:
            d_masks = torch.zeros_like(masks)
        elif slopes.masks is not None:
            g = _in_float(grad)
            d_masks = torch.stack([_reduce(g * d, like) for d, like in zip(slopes.masks, masks, strict=True)])
        return (*_vector_jacobian(grad, slopes, x, scale, sigma), d_masks, None, None, None, None)


def _nearest(
    x: Tensor, scale: Tensor, sigma: Tensor, masks: Tensor | None, bits: int, min_bits: int, zero_point: float
) -> Tensor:
    """The most probable level times the scale."""
    bounds, half = _whole_bounds(bits, min_bits, zero_point)
    a = _in_float(scale)
    u = _in_scale_units(x, a, bounds, half)
    n = _argmax_level(u, _in_float(sigma) / a, _masks_or_none(masks, u), bounds)
    return ((n + half if half else n) * a).to(x.dtype)


def _whole_bounds(bits: int, min_bits: int, zero_point: float) -> tuple[list[tuple[int, int]], float]:
    """Bounds of the nested grids, and the part of a scale by which levels and x are shifted to make levels whole."""
    half = half_step(zero_point)
    bounds = nested_bounds(bits, min_bits, zero_point)
    return [(int(low - half), int(high - half)) for low, high in bounds], half


def quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, sigma: Tensor, *, bits: int, zero_point: float, estimator: Estimator
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`quantize` without masks in x, scale and sigma: linear and differentiable in ``grad``."""
    slopes = _slopes(x, scale, sigma, None, bits, bits, zero_point, estimator)
    return _vector_jacobian(grad, slopes, x, scale, sigma)


class _Slopes(NamedTuple):
    """The most probable level and the estimator's derivatives of ``x_hat``; each has the shape of x."""

    level: Tensor
    x: Tensor
    scale: Tensor
    sigma: Tensor
    masks: list[Tensor] | None


def _slopes(
    x: Tensor,
    scale: Tensor,
    sigma: Tensor,
    masks: Tensor | None,
    bits: int,
    min_bits: int,
    zero_point: float,
    estimator: Estimator,
    with_masks: bool = False,
) -> _Slopes:
    x, scale, sigma = x.detach(), scale.detach(), sigma.detach()
    bounds, half = _whole_bounds(bits, min_bits, zero_point)
    a = _in_float(scale)
    u, s = _in_scale_units(x, a, bounds, half), _in_float(sigma) / a
    m = _masks_or_none(None if masks is None else masks.detach(), u)
    n = _argmax_level(u, s, m, bounds)
    mixture = Mixture.of(u, s, m, bounds, half)
    surrogate = ESTIMATORS[estimator]
    k0, k1 = surrogate.moments(n, mixture)

    # z_t = (t - u)/s: dz/dx = -1/sigma, dz/dscale = t/sigma, dz/dsigma = -z/sigma, and y is in units of the scale.
    d_x = -k0 / s
    level = n + half if half else n
    d_scale = level + (level * k0 + k1) / s
    d_sigma = -(k1 - torch.where(mixture.near, (u - n) * k0, 0.0)) / (s * s)
    d_masks = None
    if m is not None and with_masks and surrogate.mask_derivatives is not None:
        d_masks = [a * d for d in surrogate.mask_derivatives(n, mixture)]
    return _Slopes(level, d_x, d_scale, d_sigma, d_masks)


def _vector_jacobian(grad: Tensor, slopes: _Slopes, *likes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    g = _in_float(grad)
    d_x, d_scale, d_sigma = (_reduce(g * d, like) for d, like in zip(slopes[1:4], likes, strict=True))
    return d_x, d_scale, d_sigma


def _linear(x: Tensor, scale: Tensor, sigma: Tensor, masks: Tensor | None, *grid: Any) -> Tensor:
    """:class:`_Quantize` in PyTorch operations, for ``torch.func`` and forward mode: the value, plus each derivative
    times a zero that carries the gradient.
    """
    slopes = _slopes(x, scale, sigma, masks, *grid, with_masks=masks is not None)
    zero = slopes.x * _zero_of(x) + slopes.scale * _zero_of(scale) + slopes.sigma * _zero_of(sigma)
    if masks is not None and slopes.masks is not None:
        zero = sum((d * _zero_of(m) for d, m in zip(slopes.masks, masks.unbind(), strict=True)), start=zero)
    return (slopes.level * _in_float(scale.detach())).to(x.dtype) + zero.to(x.dtype)


def _zero_of(t: Tensor) -> Tensor:
    """Zero with derivative 1 in ``t``."""
    t = _in_float(t)
    # inf - inf is NaN, and infinite values have a level too.
    return (t - t.detach()).nan_to_num()


def _in_float(t: Tensor) -> Tensor:
    """Convert float16 and bfloat16 to float32: their mantissas (11 and 8 bits) are too short for a cell's mass."""
    return t if t.dtype in PRECISIONS else t.float()


def _in_scale_units(x: Tensor, a: Tensor, bounds: list[tuple[int, int]], half: float) -> Tensor:
    """x in units of the scale, shifted by ``half`` and clamped to _FAR beyond the widest grid.

    Beyond that only ratios of masses matter, and they have reached their limit (sigma is at most the scale). The
    distances from a larger x to two levels could round to the same number.
    """
    low, high = bounds[-1]
    u = _in_float(x) / a
    return (u - half if half else u).clamp(low - _FAR, high + _FAR)


def _masks_or_none(masks: Tensor | None, u: Tensor) -> Tensor | None:
    """The masks, or ``None`` for a single grid: its mask cancels in pi and has no effect and no gradient."""
    return None if masks is None or len(masks) == 1 else masks.to(u.dtype)


def _reduce(grad: Tensor, like: Tensor) -> Tensor:
    return grad.sum_to_size(like.shape).to(like.dtype)


def _argmax_level(u: Tensor, s: Tensor, masks: Tensor | None, bounds: list[tuple[int, int]]) -> Tensor:
    """The most probable level. p falls with |n - u|, so each nested grid has one candidate: its level nearest to u."""
    nearest = u.round()
    if masks is None:
        return nearest.clamp(*bounds[-1])
    level = nearest.clamp(*bounds[0])
    best = _log_cell((level - u).abs(), s)
    for (low, high), mask in zip(bounds[1:], masks[1:], strict=True):
        # Nearest in all of G_k. If it also lies in a narrower grid, it was a candidate there, with a larger mask.
        candidate = nearest.clamp(low, high)
        # A sum has the memory format of its first term. At equal scores, the wider grid's candidate is the rounded u.
        score = _log_cell((candidate - u).abs(), s) + mask.to(u.dtype).log()
        better = score >= best
        level = torch.where(better, candidate, level)
        best = torch.where(better, score, best)
    return level


def _log_cell(distance: Tensor, s: Tensor) -> Tensor:
    """log p_n up to a term that is the same for all cells: S(B) - S(A) = S(B) S(-A) (1 - exp(A - B))."""
    # F.logsigmoid loses the memory format. Beyond the threshold softplus returns its argument: exp(-40) is negligible.
    return -F.softplus((distance - 0.5) / s, threshold=40) - F.softplus((-0.5 - distance) / s, threshold=40)
