"""Grids of quantization levels, in units of the scale.

The grid of k bits with the zero point z has the levels ``{-z, 1 - z, … 2^k - 1 - z}``. Four kinds have names:

- *unsigned*, z = 0: ``{0 … 2^k - 1}``;
- *signed*, z = 2^(k-1): ``{-2^(k-1) … 2^(k-1) - 1}``;
- *offset*, any other whole z: for values with a short negative tail, as in LSQ+ (Bhalgat et al., CVPR workshops 2020);
- *balanced*, z = (2^k - 1)/2: ``{… -3/2, -1/2, 1/2, 3/2 …}``, symmetric and without 0, for weights of few bits, as in
  binary networks.

Grids of different widths around the same zero are nested: a wider grid contains every narrower one, and each further
bit adds levels outside of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_BITS = 8


def check_bits(name: str, bits: int) -> int:
    """Return ``bits`` if it is a whole number from 1 to 8, else raise an error that names the argument.

    Raises:
        TypeError: ``bits`` is not an ``int``.
        ValueError: ``bits`` is outside 1-8.
    """
    if not isinstance(bits, int) or isinstance(bits, bool):
        raise TypeError(f"{name} must be a whole number of bits from 1 to {MAX_BITS}, got {bits!r}.")
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"{name} must be from 1 to {MAX_BITS} bits, got {bits}.")
    return bits


def signed_zero_point(bits: int) -> int:
    """The zero point of the signed grid, ``2^(bits-1)``."""
    return int(2 ** (bits - 1))


def balanced_zero_point(bits: int) -> float:
    """The zero point of the balanced grid, ``(2^bits - 1)/2``.

    Example:
        >>> level_bounds(2, balanced_zero_point(2))
        (-1.5, 1.5)
    """
    return (2**bits - 1) / 2


def check_zero_point(bits: int, zero_point: float | None) -> float:
    """Return the zero point of a grid of ``bits``; ``None`` stands for that of the signed grid.

    Raises:
        ValueError: it is neither that of the balanced grid nor a whole number from 0 to ``2^bits - 1``.
    """
    if zero_point is None:
        return signed_zero_point(bits)
    if zero_point != balanced_zero_point(bits) and not (zero_point == int(zero_point) and 0 <= zero_point < 2**bits):
        raise ValueError(
            f"zero_point must be a whole number from 0 to {2**bits - 1} at {bits} bits, or {balanced_zero_point(bits)} "
            f"for the balanced grid, got {zero_point!r}."
        )
    return zero_point


def level_bounds(bits: int, zero_point: float | None = None) -> tuple[float, float]:
    """Lowest and highest level of the grid of ``bits``; whole numbers are integers.

    Args:
        bits: The width.
        zero_point: The zero point; ``None`` means that of the signed grid.

    Example:
        >>> level_bounds(3), level_bounds(3, 0), level_bounds(3, 1)
        ((-4, 3), (0, 7), (-1, 6))
    """
    z = signed_zero_point(bits) if zero_point is None else zero_point
    z = int(z) if z == int(z) else z
    return -z, 2**bits - 1 - z


def half_step(zero_point: float) -> float:
    """The distance of a grid's levels from whole numbers: 1/2 for a balanced grid, else 0."""
    return zero_point % 1


def narrower_zero_point(zero_point: float, bits: int, narrower: int) -> float:
    """The zero point of the grid of ``narrower`` bits around the same zero: half as large, rounded down, with each bit
    less. It is balanced if the wider grid is.

    Example:
        >>> [narrower_zero_point(z, 3, 2) for z in (4, 0, 3, 3.5)]
        [2, 0, 1, 1.5]
    """
    if half_step(zero_point):
        return balanced_zero_point(narrower)
    return int(zero_point) >> (bits - narrower)


def nested_bounds(bits: int, min_bits: int, zero_point: float | None = None) -> list[tuple[float, float]]:
    """Bounds of the nested grids ``G_min_bits ⊂ … ⊂ G_bits`` around the same zero, the narrowest first.

    Example:
        >>> nested_bounds(4, 2), nested_bounds(4, 2, 5)
        ([(-2, 1), (-4, 3), (-8, 7)], [(-1, 2), (-2, 5), (-5, 10)])
    """
    z = signed_zero_point(bits) if zero_point is None else zero_point
    return [level_bounds(k, narrower_zero_point(z, bits, k)) for k in range(min_bits, bits + 1)]


def nearest_level(u: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """The level nearest to ``u``, both in units of the scale. Half-way between whole levels, it is the even one.

    Args:
        u: Values.
        low: Lowest level, or one for each channel, broadcastable to ``u``.
        high: Highest level, in the same form.
    """
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        low, high = torch.as_tensor(low, device=u.device), torch.as_tensor(high, device=u.device)
        half = low.to(u.dtype) % 1
        return torch.minimum(torch.maximum((u - half).round() + half, low.to(u.dtype)), high.to(u.dtype))
    half = low % 1
    nearest = (u - half).round() + half if half else u.round()
    return nearest.clamp(low, high)


def along_channels(value: Tensor, dims: int, channel_dim: int) -> Tensor:
    """Reshape one value, or one value per channel, to broadcast to a tensor of ``dims`` dimensions."""
    shape = [1] * dims
    if len(value) > 1:
        shape[channel_dim] = -1
    return value.reshape(shape)


def doubled(zero_point: float) -> int:
    """Twice a zero point, which is whole for all grids: states and compiled code hold integers."""
    return math.floor(2 * zero_point)
