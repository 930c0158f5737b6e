"""Grids of quantization levels, as integers (multiples of the scale).

A k-bit grid is ``{-2^(k-1) … 2^(k-1)-1}`` when signed and ``{0 … 2^k-1}`` when unsigned. Grids are nested: a wider grid
contains every narrower one, and each further bit adds levels outside of it.
"""

from __future__ import annotations

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


def level_bounds(bits: int, signed: bool = True) -> tuple[int, int]:
    """Lowest and highest level of the ``bits``-wide grid, in units of the scale.

    Example:
        >>> level_bounds(3), level_bounds(3, signed=False)
        ((-4, 3), (0, 7))
    """
    if signed:
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def nested_bounds(bits: int, min_bits: int, signed: bool = True) -> list[tuple[int, int]]:
    """Bounds of the nested grids ``G_min_bits ⊂ … ⊂ G_bits``, narrowest first.

    Example:
        >>> nested_bounds(4, 2)
        [(-2, 1), (-4, 3), (-8, 7)]
    """
    return [level_bounds(k, signed) for k in range(min_bits, bits + 1)]


def along_channels(value: Tensor, dims: int, channel_dim: int) -> Tensor:
    """Reshape one value, or one value per channel, to broadcast to a tensor of ``dims`` dimensions."""
    shape = [1] * dims
    if len(value) > 1:
        shape[channel_dim] = -1
    return value.reshape(shape)
