"""Scale initialization: the scale with the least squared error (mse) or without clipping (minmax) for given values."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from cpq_lightning.functional.grid import level_bounds, nearest_level


class _Search(NamedTuple):
    """Scales of a coarse search over nine octaves, the best of them that are refined, and scales around each.

    The error has many local minima if there are few or clustered values.
    """

    coarse: int
    kept: int
    fine: int


_THOROUGH, _QUICK = _Search(192, 4, 48), _Search(32, 1, 12)
# Several rows (the channels of a weight) with more values than this, whose error has fewer local minima, are searched
# quickly.
_SMOOTH = 256
_ROUNDS = 4
# Elements (values × scales) computed at a time: as many as fit into a CPU cache, or enough for efficient GPU kernels.
_BLOCK, _DEVICE_BLOCK = 2**16, 2**24
# Division by a scale below float32's smallest normal number gives infinity; and an all-zero tensor has no scale.
_SMALLEST = 1e-30


def mse_scale(
    values: Tensor,
    *,
    bits: int,
    zero_point: float | None = None,
    counts: Tensor | None = None,
    thorough: bool | None = None,
) -> Tensor:
    """Least-squares scale ``argmin_a sum_i c_i (v_i - a n_i)^2`` of each row, ``n_i`` the level nearest to
    ``v_i / a``.

    The search has three stages: scales from 1/256 to twice the minmax scale (small ones clip outliers), a finer search
    around the best of them, and a few alternations between levels for the scale and the least-squares scale for the
    levels. The powers of two next to the minmax scale are candidates too, so that integers that fit on the grid stay
    exact. Several long rows, as the channels of a weight are, are searched at fewer scales: the error is within a few
    percent of the least.

    Args:
        values: Shape ``(rows, n)``; one row for each scale.
        bits: Width of the grid.
        zero_point: Zero point of the grid; ``None`` means signed, see :mod:`~cpq_lightning.functional.grid`.
        counts: Weights ``c``, same shape; ``None`` means 1.
        thorough: Whether to search at many scales, which takes ten times as long; ``None`` means for a single row, and
            for rows of at most 256 values. Of a weight in groups of 16 to 128 inputs, the error of the short search is
            at most 0.6 % above that of the long one.

    Returns:
        Scales > 0, shape ``(rows,)``, float32, in the unit of ``values``. A row of zeros gets 1.

    Example:
        >>> mse_scale(torch.tensor([[-2.0, -1.0, 0.0, 1.0]]), bits=2)
        tensor([1.])
    """
    low, high = level_bounds(bits, zero_point)
    # Negative values have the same error at any scale if the grid has no negative levels, and so have positive ones.
    values = values.float().clamp(-torch.inf if low else 0.0, torch.inf if high else 0.0)
    full = full_range(values.amin(1), values.amax(1), low, high)
    empty = full < _SMALLEST
    full = torch.where(empty, 1.0, full)
    # Squares can over- or underflow float32: divide by a power of two, and multiply the result by it.
    exponent = full.frexp().exponent - 1
    full, values = full.ldexp(-exponent), values.ldexp(-exponent[:, None])
    # The minmax scale is in [1, 2) here.
    powers = torch.tensor([1.0, 2.0]).to(full).expand(len(full), 2)
    thorough = len(values) == 1 or values.shape[1] <= _SMOOTH if thorough is None else thorough
    search = _THOROUGH if thorough else _QUICK
    found = _searched(values, counts, full, low, high, search)
    best = _best(values, counts, torch.cat([found, full[:, None], powers], 1), low, high)[:, 0]
    scale = _alternate(values, counts, best, low, high).ldexp(exponent).clamp(max=torch.finfo(torch.float32).max)
    return torch.where(empty, 1.0, scale)


def _searched(values: Tensor, counts: Tensor | None, full: Tensor, low: float, high: float, search: _Search) -> Tensor:
    """The best of the scales around the best of a coarse search, shape ``(rows, 1)``."""
    coarse = full[:, None] * torch.logspace(-8, 1, search.coarse, base=2).to(full)
    kept = _best(values, counts, coarse, low, high, search.kept)
    ratio = 2 ** (9 / (search.coarse - 1))
    around = torch.linspace(1 / ratio, ratio, search.fine).to(full)
    return _best(values, counts, torch.cat([(kept[:, :, None] * around).flatten(1), kept], 1), low, high)


def _best(values: Tensor, counts: Tensor | None, scales: Tensor, low: float, high: float, count: int = 1) -> Tensor:
    """The ``count`` scales of least error of each row."""
    return scales.gather(1, grid_errors(values, counts, scales, low, high).topk(count, largest=False).indices)


def max_scale(lowest: Tensor, highest: Tensor, *, bits: int, zero_point: float | None = None) -> Tensor:
    """The minmax scale: the smallest one that clips no value from ``lowest`` to ``highest``; 1 if both are zero.

    Example:
        >>> max_scale(torch.tensor(-4.0), torch.tensor(1.0), bits=3)
        tensor(1.)
    """
    scale = full_range(lowest, highest, *level_bounds(bits, zero_point))
    return torch.where(scale >= _SMALLEST, scale, 1.0)


def full_range(lowest: Tensor, highest: Tensor, low: float, high: float) -> Tensor:
    """The smallest scale at which levels from ``low`` to ``high`` clip nothing from ``lowest`` to ``highest``."""
    sides = [side / level for side, level in ((lowest, low), (highest, high)) if level]
    return torch.stack(sides).amax(0).clamp(min=0)


def _alternate(values: Tensor, counts: Tensor | None, scale: Tensor, low: float, high: float) -> Tensor:
    """For fixed levels n, the error is least at a = sum c v n / sum c n^2. Neither half of a round increases it."""
    for _ in range(_ROUNDS):
        n = nearest_level(values / scale[:, None], low, high)
        weighted = n if counts is None else n * counts
        power = (weighted * n).sum(1, dtype=torch.float64)
        better = ((weighted * values).sum(1, dtype=torch.float64) / power).to(scale.dtype)
        scale = torch.where((power > 0) & (better > 0), better, scale)
    return scale


def grid_errors(values: Tensor, counts: Tensor | None, scales: Tensor, low: float, high: float) -> Tensor:
    """Squared errors ``sum_i c_i (v_i - a n_i)^2`` of each row at each of its scales.

    Args:
        values: Shape ``(rows, n)``.
        counts: Weights ``c``, same shape; ``None`` means 1.
        scales: Scales ``a``, shape ``(rows, scales)``.
        low: Lowest level.
        high: Highest level.

    Returns:
        Shape of ``scales``, float64.
    """
    block = _BLOCK if values.is_cpu else _DEVICE_BLOCK
    rows = max(1, block // max(1, values.shape[1]))
    if len(values) > rows:
        # Complete rows, which lie together in memory.
        weights = itertools.repeat(None) if counts is None else counts.split(rows)
        parts = zip(values.split(rows), weights, scales.split(rows), strict=False)
        return torch.cat([grid_errors(*part, low, high) for part in parts])
    total = torch.zeros_like(scales, dtype=torch.float64)
    half = low % 1
    length = max(1, block // max(1, len(values)))
    for start in range(0, values.shape[1], length):
        part = values[:, None, start : start + length]
        count = None if counts is None else counts[:, None, start : start + length]
        size = max(1, block // max(1, part.numel()))
        for first in range(0, scales.shape[1], size):
            scale = scales[:, first : first + size, None]
            levels = part / scale
            # In place, as nearest_level would be too slow.
            levels = levels.sub_(half).round_().add_(half) if half else levels.round_()
            error = levels.clamp_(low, high).mul_(scale).sub_(part).square_()
            weighted = error if count is None else error * count
            total[:, first : first + size] += weighted.sum(2, dtype=torch.float64)
    return total


def clipped_share(values: Tensor, counts: Tensor | None, scale: Tensor, low: Tensor, high: Tensor) -> float:
    """The fraction of values that the grid clips: they lie more than half a scale beyond its lowest or highest level.

    Args:
        values: Shape ``(rows, n)``.
        counts: How often each value occurs, same shape; ``None`` means once.
        scale: The scale of each row, or one for all.
        low: Lowest level, same shape as ``scale``.
        high: Highest level, same shape as ``scale``.

    Example:
        >>> one = torch.ones(1)
        >>> clipped_share(torch.tensor([[0.0, 1.4, 1.6, 9.0]]), None, one, 0 * one, one)
        0.5
    """
    levels = values / scale[..., None]
    outside = (levels > high[..., None] + 0.5) | (levels < low[..., None] - 0.5)
    weights = torch.ones_like(values, dtype=torch.float64) if counts is None else counts.double()
    return float((outside * weights).sum() / weights.sum().clamp(min=1))


def histogram(values: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    """Counts of values in ``bins`` equal bins from ``low`` to ``high``, in int64 so that sums over ranks are exact.

    Example:
        >>> histogram(torch.tensor([0.0, 0.1, 0.9]), torch.tensor(0.0), torch.tensor(1.0), 2)
        tensor([2, 1])
    """
    width = (high - low).clamp(min=_SMALLEST) / bins
    index = ((values.flatten().float() - low) / width).nan_to_num(0.0).clamp(0, bins - 1).long()
    return torch.bincount(index, minlength=bins)


def bin_centers(low: Tensor, high: Tensor, bins: int) -> Tensor:
    """Centers of the bins of :func:`histogram`. If the range starts at 0, the first bin stands for 0.

    Example:
        >>> bin_centers(torch.tensor(-1.0), torch.tensor(1.0), 2)
        tensor([-0.5000,  0.5000])
    """
    centers = low + (high - low) * (torch.arange(bins, device=low.device) + 0.5) / bins
    if bins:
        centers[0] = torch.where(low == 0, low, centers[0])
    return centers
