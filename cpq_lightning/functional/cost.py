"""Costs of quantized tensors: averages of bits and bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable


def average_bits(sizes_and_bits: Iterable[tuple[int, float]]) -> float | None:
    """``sum_l numel_l bits_l / sum_l numel_l``, or ``None`` of nothing.

    Example:
        >>> average_bits([(300, 2), (100, 6)])
        3.0
    """
    pairs = list(sizes_and_bits)
    total = sum(numel for numel, _ in pairs)
    return sum(numel * bits for numel, bits in pairs) / total if total else None


def packed_bytes(numel: int, bits: float) -> int:
    """Bytes of ``numel`` codes packed without gaps at ``bits`` each.

    Example:
        >>> packed_bytes(9, 3)
        4
    """
    return math.ceil(numel * bits / 8)
