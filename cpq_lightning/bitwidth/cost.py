"""Costs of quantized tensors: average bits, and the cost of a vector of bit widths."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


def average_bits(sizes_and_bits: Iterable[tuple[int, float]]) -> float | None:
    """``sum_l numel_l bits_l / sum_l numel_l``, or ``None`` without elements.

    Example:
        >>> average_bits([(300, 2), (100, 6)])
        3.0
    """
    pairs = list(sizes_and_bits)
    total = sum(numel for numel, _ in pairs)
    return sum(numel * bits for numel, bits in pairs) / total if total else None


@dataclass(frozen=True)
class WidthCost:
    """The cost ``constant + sum_t coefficient_t · b_left(t) · b_right(t)`` of a vector of widths ``b``.

    Bits and bytes are linear in the widths, bit operations bilinear: MACs times the weight's width times the
    activation's.

    Attributes:
        coefficients: Shape (terms,), float64, not negative.
        left: Indices into the widths, shape (terms,).
        right: Indices of the other factor, shape (terms,). The index ``n``, the number of widths, means a factor of 1.
        constant: The part of the cost that does not depend on the widths.
        exact: The exact cost of integer widths, shape (n,), where it is not such a sum: a file rounds each weight up to
            whole bytes.
        rounding: By how much one bit may cost less under ``exact`` than its term says.

    Example:
        >>> index = torch.tensor
        >>> cost = WidthCost(index([3.0, 1.0]).double(), index([0, 1]), index([1, 2]), 5.0)
        >>> cost(index([2.0, 4.0]).double())  # 3 b0 b1 + b1 + 5
        33.0
    """

    coefficients: Tensor
    left: Tensor
    right: Tensor
    constant: float
    exact: Callable[[Tensor], float] | None = None
    rounding: float = 0.0

    def __call__(self, widths: Tensor) -> float:
        """The cost of ``widths``, shape (n,), float64."""
        padded = _padded(widths)
        return self.constant + float((self.coefficients * padded[self.left] * padded[self.right]).sum())

    def of_integer_widths(self, widths: Tensor) -> float:
        """The exact cost of integer widths, shape (n,), float64."""
        return self(widths) if self.exact is None else self.exact(widths)

    def gradient(self, widths: Tensor) -> Tensor:
        """``d cost / d b``, shape (n,)."""
        padded = _padded(widths)
        gradient = torch.zeros_like(padded)
        gradient.index_add_(0, self.left, self.coefficients * padded[self.right])
        gradient.index_add_(0, self.right, self.coefficients * padded[self.left])
        return gradient[:-1]


def _padded(widths: Tensor) -> Tensor:
    return torch.cat([widths, widths.new_ones(1)])
