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
truncated logistics. All that is needed of one such truncated logistic is in :class:`_Interval`. Every
derivative is collected as two moments over the cell boundaries ``t``, ``k0 = sum_t dy/dz_t`` and
``k1 = sum_t (t - n) dy/dz_t`` with ``z_t = (t - u) / s`` and ``u = x / a``; the chain rule to ``x``, ``step`` and
``sigma`` is then the same three lines for both estimators. Nothing has size ``numel * 2**bits``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cpq_lightning.functional.grid import check_bits, ring_bounds

Estimator = Literal["argmax", "expectation"]

# exp(-WINDOW) is the weight of the first cell boundary that the expectation leaves out.
_WINDOW = {torch.float64: 32.0, torch.float32: 15.0}
# A mask's derivative is the mass that the masked ring would bring, up to exp(distance / sigma). Below float64 it
# is held at exp(40), far over anything that trains, so that sums over a tensor stay finite.
_MAX_LOG_RATIO = {torch.float64: math.inf, torch.float32: 40.0}


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
        if masks is not None and not (
            (masks[0] == 1).all() and (masks[1:] <= masks[:-1]).all() and (masks >= 0).all()
        ):
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
        a = _computable(step)
        u = _computable(x) / a
        n = _argmax_level(u, _computable(sigma) / a, _effective(masks, u), ring_bounds(bits, min_bits, signed))
        return (n * a).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, step, sigma, masks = ctx.saved_tensors
        bits, min_bits, signed, estimator = ctx.grid
        bounds = ring_bounds(bits, min_bits, signed)
        a, g = _computable(step), _computable(grad)
        u, s = _computable(x) / a, _computable(sigma) / a
        m = _effective(masks, u)
        n = _argmax_level(u, s, m, bounds)
        mixture = _Mixture.of(u, s, m, bounds)
        mean = None
        if estimator == "argmax":
            k0, k1 = _argmax_moments(u, s, n, mixture, None if m is None else _mask_of(n, m, bounds))
        else:
            inner = [part.inner_boundaries(s) for part in mixture.parts]
            mean = _mixture_mean(n, mixture, inner)
            k0, k1 = _expectation_moments(n, mixture, inner, mean)

        # z_t = (t - u)/s: dz/dx = -1/sigma, dz/dstep = t/sigma, dz/dsigma = -z/sigma, and y is in units of the step.
        d_x = -k0 / s
        d_step = n + (n * k0 + k1) / s
        d_sigma = -(k1 - torch.where(mixture.near, (u - n) * k0, 0.0)) / (s * s)
        grads = [_reduce(g * d, like) for d, like in ((d_x, x), (d_step, step), (d_sigma, sigma))]
        d_masks = None
        if ctx.needs_input_grad[3] and m is None:
            d_masks = torch.zeros_like(masks)
        elif ctx.needs_input_grad[3]:
            rings = _mask_derivatives(u, s, n, mixture, m, bounds, mean)
            d_masks = torch.stack([_reduce(g * a * d, like) for d, like in zip(rings, masks, strict=True)])
        return (*grads, d_masks, None, None, None, None)


def _computable(t: Tensor) -> Tensor:
    """Halves in float32: their eight or eleven bits of mantissa cannot hold a cell's mass."""
    return t if t.dtype in _WINDOW else t.float()


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
        score = mask.to(u.dtype).log() + _log_cell((candidate - u).abs(), s)
        better = score > best
        level = torch.where(better, candidate, level)
        best = torch.where(better, score, best)
    return level


def _log_cell(distance: Tensor, s: Tensor) -> Tensor:
    """log p_n, but for a term that all cells share: S(B) - S(A) = S(B) S(-A) (1 - exp(A - B))."""
    return F.logsigmoid((0.5 - distance) / s) + F.logsigmoid((0.5 + distance) / s)


@dataclass
class _Interval:
    """A logistic around ``u`` truncated to the levels ``low … high``, seen from its level ``center`` nearest to u.

    The frame is reflected so that ``d = |u - center|``. For ``d > 1/2`` the whole interval lies on one side of u, and
    every mass carries the factor ``y = exp(-(d - d0)/s)``, ``d0 = min(d, 1/2)``, which is left out (``*_hat``): what
    remains is of order 1 however far u is away, and ratios of masses lose no digits.
    """

    center: Tensor
    side: Tensor  # +1 where u >= center, else -1
    d: Tensor
    d0: Tensor
    y: Tensor
    low: Tensor  # reflected, relative to center: low <= 0 <= high
    high: Tensor
    s_low: Tensor  # S at the lower boundary low - 1/2, over y
    r_high: Tensor  # 1 - S at the upper boundary high + 1/2
    mass: Tensor  # over y
    edge_low: Tensor  # d log mass / d z at the lower boundary, times -1
    edge_high: Tensor  # d log mass / d z at the upper boundary

    @classmethod
    def of(cls, u: Tensor, s: Tensor, low: Tensor | float, high: Tensor | float) -> _Interval:
        center = u.round().clamp(low, high)  # type: ignore[arg-type]
        v = u - center
        side = torch.where(v >= 0, 1.0, -1.0).to(u.dtype)
        d = v.abs()
        d0 = d.clamp(max=0.5)
        y = torch.exp(-(d - d0) / s)
        below, above = low - center, high - center
        lo = torch.where(side > 0, below, -above)
        hi = torch.where(side > 0, above, -below)
        e = torch.exp((lo - 0.5 - d0) / s)
        g = torch.exp(-(hi + 0.5 - d0) / s)
        s_low = e / (1 + y * e)
        r_high = g / (y + g)
        # Beyond the edge (d > 1/2) hi is 0 and g = 1; inside, y = 1. One line serves both without a subtraction of
        # nearly equal numbers.
        mass = 1 / (y + g) - s_low
        return cls(
            center, side, d, d0, y, lo, hi, s_low, r_high, mass,
            edge_low=e / ((1 + y * e) ** 2 * mass),
            edge_high=g / ((y + g) ** 2 * mass),
        )  # fmt: skip

    def log_mass(self, s: Tensor) -> Tensor:
        """Log of the mass; the factor y goes in here, where it cannot underflow."""
        return self.mass.log() - (self.d - self.d0) / s

    def moments(self) -> tuple[Tensor, Tensor]:
        """Of d log mass / dz_t over its two boundaries: the sum, and the sum weighted with t - center."""
        k0 = self.side * (self.edge_high - self.edge_low)
        k1 = self.edge_high * (self.high + 0.5) - self.edge_low * (self.low - 0.5)
        return k0, k1

    def inner_boundaries(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean level relative to center (reflected), and sums over inner boundaries of S'_t and tau_t S'_t over mass.

        The mean is an Abel sum: (sum of the masses above each boundary right of center, minus those below each
        boundary left of it) / mass. Boundaries fall off geometrically, exp(-|t - u|/s), from the center outwards.
        """
        decay = torch.exp(-1 / s)
        left = torch.exp((-0.5 - self.d0) / s)
        right = torch.exp((self.d0 - 0.5) / s)
        mean, slope, slope_t = (torch.zeros_like(self.mass) for _ in range(3))
        for j in range(_window(s)):
            inside = self.low + j < 0
            sl = left / (1 + self.y * left)
            ds = torch.where(inside, sl / (1 + self.y * left), 0.0)
            mean = mean - torch.where(inside, sl - self.s_low, 0.0)
            # Levels right of center exist only where u is inside, and there y = 1.
            inside = self.high - j > 0
            r = right / (1 + right)
            dr = torch.where(inside, r / (1 + right), 0.0)
            mean = mean + torch.where(inside, r - self.r_high, 0.0)
            slope = slope + ds + dr
            slope_t = slope_t + (j + 0.5) * (dr - ds)
            left, right = left * decay, right * decay
        return mean / self.mass, slope / self.mass, slope_t / self.mass


def _window(s: Tensor) -> int:
    """Boundaries to each side that hold all of the sum to rounding: c * s + 1, at most c + 1 as s <= 1.

    The values of s are read only where reading costs nothing (on the CPU, outside a compiler).
    """
    reach = _WINDOW[s.dtype]
    if s.device.type == "cpu" and not torch.compiler.is_compiling() and s.numel() > 0:
        reach *= min(1.0, s.max().item())
    return math.ceil(reach) + 1


@dataclass
class _Mixture:
    """The categorical as a mixture of truncated logistics, one a nested grid, with weights (m_k - m_(k+1)) M_k / Z."""

    parts: list[_Interval]
    weights: list[Tensor]
    log_z: Tensor
    near: Tensor  # False where u is so far from all the mass that sums of z-derivatives vanish below rounding

    @classmethod
    def of(cls, u: Tensor, s: Tensor, masks: Tensor | None, bounds: list[tuple[int, int]]) -> _Mixture:
        if masks is None:
            parts = [_Interval.of(u, s, *bounds[-1])]
            weights, log_z = [torch.ones_like(u)], parts[0].log_mass(s)
        else:
            parts = [_Interval.of(u, s, low, high) for low, high in bounds]
            shares = torch.cat([masks[:-1] - masks[1:], masks[-1:]]).clamp(min=0)
            logs = [share.log() + part.log_mass(s) for share, part in zip(shares, parts, strict=True)]
            log_z = torch.stack(torch.broadcast_tensors(*logs)).logsumexp(0)
            weights = [torch.exp(log - log_z) for log in logs]
        eps = torch.finfo(u.dtype).eps
        near = torch.zeros_like(u, dtype=torch.bool)
        for part, weight in zip(parts, weights, strict=True):
            near = near | ((part.y > eps) & (weight > eps))
        return cls(parts, weights, log_z, near)


def _argmax_moments(
    u: Tensor, s: Tensor, n: Tensor, mixture: _Mixture, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Moments of y = n pi_n with the factor n held: n pi_n (d log p_n - d log Z)."""
    cell = _Interval.of(u, s, n, n)
    k0, k1 = cell.moments()
    for part, weight in zip(mixture.parts, mixture.weights, strict=True):
        p0, p1 = part.moments()
        k0 = k0 - weight * p0
        k1 = k1 - weight * (p1 + (part.center - n) * p0)
    scale = n * torch.exp(cell.log_mass(s) - mixture.log_z)
    if mask is not None:
        scale = scale * mask
    return torch.where(mixture.near, scale * k0, 0.0), scale * k1


def _expectation_moments(
    n: Tensor, mixture: _Mixture, inner: list[tuple[Tensor, Tensor, Tensor]], mean: Tensor
) -> tuple[Tensor, Tensor]:
    """Moments of y = E: in each part, the boundaries between its levels (weight -1) and its two edges."""
    k0, k1 = torch.zeros_like(n), torch.zeros_like(n)
    for part, weight, (_, slope, slope_t) in zip(mixture.parts, mixture.weights, inner, strict=True):
        offset = part.side * (n + mean - part.center)
        at_high = (part.high - offset) * part.edge_high
        at_low = (part.low - offset) * part.edge_low
        p0 = at_high - at_low - slope
        p1 = part.side * (at_high * (part.high + 0.5) - at_low * (part.low - 0.5) - slope_t)
        k0 = k0 + weight * p0
        k1 = k1 + weight * (p1 + (part.center - n) * p0)
    return torch.where(mixture.near, k0, 0.0), k1


def _mixture_mean(n: Tensor, mixture: _Mixture, inner: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """E - n."""
    mean = torch.zeros_like(n)
    for part, weight, (part_mean, _, _) in zip(mixture.parts, mixture.weights, inner, strict=True):
        mean = mean + weight * (part.center - n + part.side * part_mean)
    return mean


def _mask_derivatives(
    u: Tensor,
    s: Tensor,
    n: Tensor,
    mixture: _Mixture,
    masks: Tensor,
    bounds: list[tuple[int, int]],
    mean: Tensor | None,
) -> list[Tensor]:
    """dy/dm of each ring: sum over the ring of (n' - E) p_n'/Z, or, where there is no mean, of the argmax surrogate.

    That one is n pi_n (1/m - P/Z) for the chosen ring, with P the ring's mass, and -n pi_n P/Z for any other. A ring
    is two intervals, one to each side of the grid inside it: its mass as a difference of the masses of two grids
    would lose all its digits where it is small.
    """
    cap = _MAX_LOG_RATIO[u.dtype]
    shares, weights, moments = [], [], []
    for pieces, mask in zip(_ring_pieces(bounds), masks, strict=True):
        share, weight, moment = (torch.zeros_like(u) for _ in range(3))
        for low, high in pieces:
            piece = _Interval.of(u, s, low, high)
            log_share = piece.log_mass(s) - mixture.log_z
            p = torch.exp(log_share.clamp(max=cap))
            share = share + p
            weight = weight + torch.exp(mask.log() + log_share)
            if mean is not None:
                moment = moment + p * (piece.center - n + piece.side * piece.inner_boundaries(s)[0] - mean)
        shares.append(share)
        weights.append(weight)
        moments.append(moment)
    if mean is not None:
        return moments

    cell = torch.exp((_Interval.of(u, s, n, n).log_mass(s) - mixture.log_z).clamp(max=cap))
    pi = cell * _mask_of(n, masks, bounds)
    others = _sums_of_others(weights)
    derivatives = []
    for k, (share, other) in enumerate(zip(shares, others, strict=True)):
        # 1/m - P/Z = (1 - m P/Z)/m, and 1 - m P/Z is the weight of all other rings.
        d = n * torch.where(_in_ring(n, bounds, k), cell * other, -pi * share)
        derivatives.append(torch.where(n == 0, 0.0, d))
    return derivatives


def _ring_pieces(bounds: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """The one or two intervals of levels of each ring; an unsigned outer ring has no left side."""
    pieces = [[bounds[0]]]
    for (in_low, in_high), (low, high) in zip(bounds[:-1], bounds[1:], strict=True):
        pieces.append([piece for piece in ((low, in_low - 1), (in_high + 1, high)) if piece[0] <= piece[1]])
    return pieces


def _sums_of_others(values: list[Tensor]) -> list[Tensor]:
    """For each value the sum of all the others, without subtracting it from the whole."""
    zero = torch.zeros_like(values[0])
    before, after = [zero], [zero]
    for value in values[:-1]:
        before.append(before[-1] + value)
    for value in reversed(values[1:]):
        after.append(after[-1] + value)
    return [b + a for b, a in zip(before, reversed(after), strict=True)]


def _in_ring(n: Tensor, bounds: list[tuple[int, int]], k: int) -> Tensor:
    inside = (n >= bounds[k][0]) & (n <= bounds[k][1])
    return inside if k == 0 else inside & ((n < bounds[k - 1][0]) | (n > bounds[k - 1][1]))


def _mask_of(n: Tensor, masks: Tensor, bounds: list[tuple[int, int]]) -> Tensor:
    """The mask of the ring that level n lies in."""
    mask = masks[-1]
    for (low, high), ring_mask in zip(reversed(bounds[:-1]), reversed(masks[:-1].unbind()), strict=True):
        mask = torch.where((n >= low) & (n <= high), ring_mask, mask)
    return mask
