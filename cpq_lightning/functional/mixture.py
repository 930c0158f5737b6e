"""The categorical over a grid as a mixture of truncated logistics, and the derivatives of the surrogates.

A surrogate is the function that the backward differentiates in place of the argmax: ``n pi_n`` with constant ``n``
(estimator ``argmax``), or the mean ``E`` (estimator ``expectation``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from cpq_lightning.functional.dropbits import shares_from_masks
from cpq_lightning.functional.truncated import Interval

# A mask's derivative contains the mass of the masked levels over Z, up to exp(distance / sigma). In float32 it is
# clamped to exp(40), far above any useful gradient, so that sums over a tensor stay finite.
_MAX_LOG_RATIO = {torch.float64: math.inf, torch.float32: 40.0}


@dataclass
class Mixture:
    """One truncated logistic for each nested grid, with weights (m_k - m_(k+1)) M_k / Z.

    ``u`` is x and ``s`` is sigma, both in units of the scale; ``masks`` and ``bounds`` are those of each nested grid.
    Levels n are whole numbers here: u and the levels are shifted by ``half``, 1/2 for a balanced grid, else 0.
    """

    u: Tensor
    s: Tensor
    masks: Tensor | None
    bounds: list[tuple[int, int]]
    half: float
    parts: list[Interval]
    weights: list[Tensor]
    log_z: Tensor
    near: Tensor  # False where u is so far from all mass that sums of z-derivatives are below rounding

    @classmethod
    def of(cls, u: Tensor, s: Tensor, masks: Tensor | None, bounds: list[tuple[int, int]], half: float) -> Mixture:
        if masks is None:
            parts = [Interval.of(u, s, *bounds[-1])]
            weights, log_z = [torch.ones_like(u)], parts[0].log_mass(s)
        else:
            parts = [Interval.of(u, s, low, high) for low, high in bounds]
            shares = shares_from_masks(masks).clamp(min=0)
            logs = [share.log() + part.log_mass(s) for share, part in zip(shares, parts, strict=True)]
            log_z = torch.stack(torch.broadcast_tensors(*logs)).logsumexp(0)
            weights = [torch.exp(log - log_z) for log in logs]
        eps = torch.finfo(u.dtype).eps
        near = torch.zeros_like(u, dtype=torch.bool)
        for part, weight in zip(parts, weights, strict=True):
            near = near | ((part.y > eps) & (weight > eps))
        return cls(u, s, masks, bounds, half, parts, weights, log_z, near)


class Surrogate(NamedTuple):
    """The derivatives of a surrogate y, in units of the scale.

    Attributes:
        moments: Computes from the most probable level ``n`` and the mixture the moments ``k0 = sum_t dy/dz_t`` and
            ``k1 = sum_t (t - n) dy/dz_t``, each in the shape of x.
        mask_derivatives: Computes from the same two dy/dm for the mask of each nested grid; ``None`` means zero.
    """

    moments: Callable[[Tensor, Mixture], tuple[Tensor, Tensor]]
    mask_derivatives: Callable[[Tensor, Mixture], list[Tensor]] | None = None


def argmax_moments(n: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
    """Moments of y = n pi_n with a constant factor n: n pi_n (d log p_n - d log Z)."""
    s = mixture.s
    cell = Interval.of(mixture.u, s, n, n)
    k0, k1 = cell.moments()
    for part, weight in zip(mixture.parts, mixture.weights, strict=True):
        p0, p1 = part.moments()
        k0 = k0 - weight * p0
        k1 = k1 - weight * (p1 + (part.center - n) * p0)
    scale = (n + mixture.half) * torch.exp(cell.log_mass(s) - mixture.log_z)
    if mixture.masks is not None:
        scale = scale * mask_of(n, mixture.masks, mixture.bounds)
    return torch.where(mixture.near, scale * k0, 0.0), scale * k1


def expectation_moments(n: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
    """Moments of y = E: in each component, the boundaries between its levels (weight -1) and its two edges."""
    inner = [part.inner_boundaries(mixture.s) for part in mixture.parts]
    mean = mixture_mean(n, mixture, inner)
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


def mixture_mean(n: Tensor, mixture: Mixture, inner: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """E - n."""
    mean = torch.zeros_like(n)
    for part, weight, (part_mean, _, _) in zip(mixture.parts, mixture.weights, inner, strict=True):
        mean = mean + weight * (part.center - n + part.side * part_mean)
    return mean


def mask_derivatives(n: Tensor, mixture: Mixture, *, of_mean: bool) -> list[Tensor]:
    """dy/dm for the mask of each width, for the mean E or for the argmax surrogate n pi_n.

    Let P be the mass of the levels that a bit adds, mu their mean level and W = m P/Z their weight. Then dE/dm =
    P/Z (mu - E), and d(n pi_n)/dm is n pi_n (1 - W)/m for the bit that adds the chosen level n and -n pi_n P/Z for any
    other bit. Both are computed from sums over all *other* bits, as the differences mu - E and 1 - W cancel where one
    bit has all the weight. For the same reason the added levels are two intervals, one on each side of the narrower
    grid, and not the difference of two grids.
    """
    u, s, masks, bounds = mixture.u, mixture.s, mixture.masks, mixture.bounds
    assert masks is not None
    cap = _MAX_LOG_RATIO[u.dtype]
    shares, weights, means = [], [], []
    for pieces, mask in zip(_added_intervals(bounds), masks, strict=True):
        intervals = [Interval.of(u, s, low, high) for low, high in pieces]
        logs = torch.stack([interval.log_mass(s) for interval in intervals])
        log_share = logs.logsumexp(0) - mixture.log_z
        shares.append(torch.exp(log_share.clamp(max=cap)))
        weights.append(torch.exp(mask.log() + log_share))
        if of_mean:
            levels = [part.center - n + part.side * part.inner_boundaries(s)[0] for part in intervals]
            means.append((logs.softmax(0) * torch.stack(levels)).sum(0))
    other_weights = _sums_of_others(weights)
    if of_mean:
        other_moments = _sums_of_others([weight * mean for weight, mean in zip(weights, means, strict=True)])
        return [p * (mu * w - m) for p, mu, w, m in zip(shares, means, other_weights, other_moments, strict=True)]

    cell = torch.exp((Interval.of(u, s, n, n).log_mass(s) - mixture.log_z).clamp(max=cap))
    pi = cell * mask_of(n, masks, bounds)
    level, derivatives = n + mixture.half, []
    for k, (share, others) in enumerate(zip(shares, other_weights, strict=True)):
        d = level * torch.where(_is_added(n, bounds, k), cell * others, -pi * share)
        derivatives.append(torch.where(level == 0, 0.0, d))
    return derivatives


def _added_intervals(bounds: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """The levels that each bit adds, as one or two intervals; in an unsigned grid only on the right."""
    pieces = [[bounds[0]]]
    for (in_low, in_high), (low, high) in pairwise(bounds):
        pieces.append([piece for piece in ((low, in_low - 1), (in_high + 1, high)) if piece[0] <= piece[1]])
    return pieces


def _sums_of_others(values: list[Tensor]) -> list[Tensor]:
    """For each value the sum of all others, without subtracting it from the total."""
    zero = torch.zeros_like(values[0])
    before, after = [zero], [zero]
    for value in values[:-1]:
        before.append(before[-1] + value)
    for value in reversed(values[1:]):
        after.append(after[-1] + value)
    return [b + a for b, a in zip(before, reversed(after), strict=True)]


def _is_added(n: Tensor, bounds: list[tuple[int, int]], k: int) -> Tensor:
    """Whether nested grid k contains level n and the next narrower grid does not."""
    inside = (n >= bounds[k][0]) & (n <= bounds[k][1])
    return inside if k == 0 else inside & ((n < bounds[k - 1][0]) | (n > bounds[k - 1][1]))


def mask_of(n: Tensor, masks: Tensor, bounds: list[tuple[int, int]]) -> Tensor:
    """The mask of the narrowest nested grid that contains level n."""
    mask = masks[-1]
    for (low, high), grid_mask in zip(reversed(bounds[:-1]), reversed(masks[:-1].unbind()), strict=True):
        mask = torch.where((n >= low) & (n <= high), grid_mask, mask)
    return mask
