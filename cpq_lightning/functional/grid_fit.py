"""Fitting a grid to a histogram: the zero point and the scale with the least squared error, or without clipping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cpq_lightning.functional.grid import level_bounds, nearest_level, signed_zero_point
from cpq_lightning.functional.ranges import full_range, grid_errors, max_scale, mse_scale

# Negative values up to this share of the maximum are rounding errors.
NEGLIGIBLE = 1e-6
# Relative squared error below the precision of float32.
_MIN_ERROR = 1e-14
# With "auto" an offset must lower the squared error by this share, as some runtimes have no offsets.
_WORTH = 0.01
# Size of the search for zero points: bins of the histogram, and scales.
_SEARCH_BINS, _SEARCH_SCALES = 2**10, 32
_SMALLEST = 1e-30


class GridFit(NamedTuple):
    """A grid that was fitted to values.

    Attributes:
        scale: Shape (1,), or (channels,), float32.
        zero_point: The zero point.
    """

    scale: Tensor
    zero_point: float


def fit_histogram(centers: Tensor, counts: Tensor, bits: int, grid: str, least_zero_point: float = 0) -> GridFit:
    """The grid of least squared error for a histogram.

    Args:
        centers: Centers of the bins, in ascending order, shape (1, bins).
        counts: Their counts, same shape.
        bits: The width.
        grid: ``"signed"``, ``"unsigned"``, ``"offset"`` (any zero point), ``"int8"`` (signed, or unsigned of at most 7
            bits), or ``"auto"``: an offset where it lowers the error by at least a hundredth.
        least_zero_point: The least zero point to consider.
    """
    ends = [z for z in (0, signed_zero_point(bits)) if z >= least_zero_point]
    if grid in ("signed", "unsigned", "int8"):
        kinds = int8_kinds(bits) if grid == "int8" else (grid,)
        zero_points: list[float] = [signed_zero_point(bits) if kind == "signed" else 0 for kind in kinds]
        # The least zero point is that of the grid as it is, where only one kind is allowed.
        candidates = [z for z in zero_points if z >= least_zero_point] or zero_points
    else:
        negative, positive = bool(((centers < 0) & (counts > 0)).any()), bool(((centers > 0) & (counts > 0)).any())
        # Values of one sign need one half of the zero points at most.
        highest = 2**bits - 1 if negative and not positive else signed_zero_point(bits) if negative else 0
        lowest = math.ceil(least_zero_point)
        candidates = promising_zero_points(
            centers, counts, bits=bits, candidates=range(lowest, max(lowest, highest) + 1)
        )
        if grid == "auto":
            candidates = list(dict.fromkeys([*(z for z in ends if z <= highest), *candidates]))
    fits = [GridFit(mse_scale(centers, bits=bits, zero_point=z, counts=counts), z) for z in candidates]
    errors = [grid_error(centers, counts, fit.scale, bits, fit.zero_point) for fit in fits]
    if grid == "auto":
        errors = [e if fit.zero_point in ends else e / (1 - _WORTH) for e, fit in zip(errors, fits, strict=True)]
    return fits[min(range(len(fits)), key=errors.__getitem__)]


def fit_grid(centers: Tensor, counts: Tensor, bits: int, rule: str, grid: str, least_zero_point: float = 0) -> GridFit:
    """:func:`fit_histogram` for the rule ``"mse"``, :func:`fit_range` for ``"max"``."""
    if rule == "max":
        return fit_range(centers.min(), centers.max(), bits, grid, least_zero_point)
    return fit_histogram(centers, counts, bits, grid, least_zero_point)


def fit_range(low: Tensor, high: Tensor, bits: int, grid: str, least_zero_point: float = 0) -> GridFit:
    """The grid with the smallest scale that clips nothing from ``low`` to ``high``.

    Args:
        low: The lowest value.
        high: The highest value.
        bits: The width.
        grid: As for :func:`fit_histogram`; ``"unsigned"`` clips negative values.
        least_zero_point: The least zero point to consider.
    """
    negative = least_zero_point > 0 or bool(low < -NEGLIGIBLE * high.abs())
    if grid == "int8":
        grid = "signed" if negative or bits > 7 else "unsigned"
    candidates: list[float] = [0] if grid == "unsigned" or (grid != "signed" and not negative) else []
    if not candidates and grid != "signed":
        bottom = low.clamp(max=0)
        span = (high.clamp(min=0) - bottom).clamp(min=_SMALLEST)
        nearest = round(float(-bottom / span * (2**bits - 1)))
        candidates = [z for z in (nearest - 1, nearest, nearest + 1) if max(1, least_zero_point) <= z < 2**bits] or [1]
    if grid == "signed" or (grid == "auto" and negative):
        candidates.insert(0, signed_zero_point(bits))
    fits = [GridFit(max_scale(low, high, bits=bits, zero_point=z).reshape(1), z) for z in candidates]
    worth = 1 - _WORTH if grid == "auto" else 1.0
    sizes = [float(fit.scale) / (1.0 if place == 0 else worth) for place, fit in enumerate(fits)]
    return fits[min(range(len(fits)), key=sizes.__getitem__)]


def int8_kinds(bits: int) -> tuple[str, ...]:
    """The kinds of grids of inputs that signed bytes with a zero point of 0 hold."""
    return ("unsigned", "signed") if bits <= 7 else ("signed",)


def grid_error(values: Tensor, counts: Tensor, scale: Tensor, bits: int, zero_point: float) -> float:
    """Squared error relative to that of an all-zero output, at least 1e-14."""
    quantized = nearest_level(values / scale[:, None], *level_bounds(bits, zero_point)) * scale[:, None]
    error = ((values - quantized).double().square() * counts).sum() / (values.double().square() * counts).sum()
    return max(float(error), _MIN_ERROR)


def promising_zero_points(
    values: Tensor, counts: Tensor, *, bits: int, candidates: Sequence[float], keep: int = 3
) -> list[float]:
    """The zero points whose grids have the least squared errors, by a coarse search over scales, the best first.

    Args:
        values: Sorted values, such as the centers of a histogram's bins, shape ``(1, n)``.
        counts: How often each value occurs, same shape.
        bits: Width of the grids.
        candidates: The zero points to try.
        keep: The number of zero points to return.

    Example:
        >>> x = torch.linspace(-0.25, 3.5, 512)[None]
        >>> promising_zero_points(x, torch.ones_like(x), bits=4, candidates=range(9), keep=1)
        [1]
    """
    if len(candidates) <= keep:
        return list(candidates)
    group = max(1, values.shape[1] // _SEARCH_BINS)
    usable = values.shape[1] // group * group
    part, weights = (t[:, :usable].double().reshape(1, -1, group) for t in (values, counts))
    total = weights.sum(2)
    values = torch.where(total > 0, (part * weights).sum(2) / total.clamp(min=1), part.mean(2))
    # Squares of the largest or smallest float32 would over- or underflow.
    values = (values / values.abs().amax().clamp(min=_SMALLEST)).float()
    errors = []
    for zero_point in candidates:
        low, high = level_bounds(bits, zero_point)
        clipped = values.clamp(-torch.inf if low else 0.0, torch.inf if high else 0.0)
        full = full_range(clipped.amin(1), clipped.amax(1), low, high).clamp(min=_SMALLEST)
        scales = full[:, None] * torch.logspace(-6, 0, _SEARCH_SCALES, base=2).to(full)
        errors.append(float(grid_errors(values, total, scales, low, high).min()))
    return [candidates[index] for index in sorted(range(len(errors)), key=errors.__getitem__)[:keep]]
