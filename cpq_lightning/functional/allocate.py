"""Whole widths on a budget: the cheapest single changes that bring what was learned to its target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cpq_lightning.functional.cost import WidthCost


@dataclass(frozen=True)
class WidthChange:
    """One width, a bit up or down."""

    row: int
    before: int
    after: int


def adjust_widths(
    widths: Tensor,
    narrowest: Tensor,
    widest: Tensor,
    cost: WidthCost,
    target: float,
    tolerance: float,
    price: Callable[[Tensor, int], Tensor],
    follows: Tensor | None = None,
) -> tuple[Tensor, list[WidthChange]]:
    """Change widths by single bits until their cost is within ``tolerance`` of ``target``, or as near as they permit.

    Of the changes that bring the cost nearer, the one with the least price for each unit of cost is taken, again and
    again; where none is left, exchanges of a bit between two rows; where those end off the target, one bit of a row
    that is too large for it, which the others make up for. Rows that follow the mean of the others shall neither take
    bits from them, nor leave them any, by being whole: the others come first, to where the target is met by a mean that
    all have in common.

    Args:
        widths: Whole widths, shape (rows,), float64.
        narrowest: Least width of each row.
        widest: Greatest width of each row.
        cost: What widths cost. Rows that do not appear in it stay.
        target: What they shall cost.
        tolerance: How far from it they may stay.
        price: What a change of each row by ``+1`` or ``-1`` costs the network, in any unit: ``price(widths, ±1)``;
            less than 0 is what it gains.
        follows: Which rows follow the mean of the others, shape (rows,), bool.

    Returns:
        New widths, and the changes in order.

    Example:
        >>> rows = torch.arange(2)
        >>> cost = WidthCost(torch.tensor([0.5, 0.5]).double(), rows, torch.tensor([2, 2]), 0.0)
        >>> four, two, eight = (torch.full((2,), b).double() for b in (4.0, 2.0, 8.0))
        >>> price = lambda widths, by: torch.tensor([2.0, 1.0]).double()
        >>> adjust_widths(four, two, eight, cost, 3.5, 0.01, price)
        (tensor([4., 3.], dtype=torch.float64), [WidthChange(row=1, before=4, after=3)])
    """
    changes: list[WidthChange] = []
    own = cost.gradient(widths) > 0
    follow = own & follows if follows is not None else torch.zeros_like(own)
    lead = own & ~follow
    if lead.any() and follow.any():
        meant = torch.where(follow, _common_width(cost, target, own, widths, narrowest, widest), widths)
        unit = cost.gradient(meant)
        # What they may be off the target by is their part of what all may.
        near = tolerance * float(unit[lead].sum() / unit[own].sum())
        low, high = torch.where(lead, narrowest, meant), torch.where(lead, widest, meant)
        led, changes = _approach(meant, low, high, cost, target, near, price)
        widths = torch.where(lead, led, widths)
        low, high = torch.where(follow, narrowest, widths), torch.where(follow, widest, widths)
        # All of them as near to it as whole widths are.
        widths, more = _approach(widths, low, high, cost, target, tolerance, lambda now, by: (now + by - meant).abs())
        changes += more
    found, more = _approach(widths, narrowest, widest, cost, target, tolerance, price)
    return found, changes + more


def _approach(
    widths: Tensor,
    narrowest: Tensor,
    widest: Tensor,
    cost: WidthCost,
    target: float,
    tolerance: float,
    price: Callable[[Tensor, int], Tensor],
    past: bool = True,
) -> tuple[Tensor, list[WidthChange]]:
    """:func:`adjust_widths` where no row follows others; ``past``: whether a large row may go past the target."""
    widths, changes = widths.clone(), []

    def change(row: int, by: int) -> None:
        changes.append(WidthChange(row, int(widths[row]), int(widths[row]) + by))
        widths[row] += by

    while True:
        gap = cost(widths) - target
        by = -1 if gap > 0 else 1
        # Costs are linear in any one width.
        unit = cost.gradient(widths)
        possible = (unit > 0) & (widths + by >= narrowest) & (widths + by <= widest)
        if abs(gap) <= tolerance:
            return widths, changes
        nearer = possible & ((gap + by * unit).abs() < abs(gap) - 1e-6 * unit)
        if nearer.any():
            prices = price(widths, by)
            # Of what costs nothing the largest.
            prices = torch.where(prices >= 0, prices.clamp(min=_LEAST), prices)
            ranked = torch.where(nearer, prices / unit.clamp(min=1e-300), torch.inf)
            change(int(ranked.argmin()), by)
            continue
        pair = _exchange(widths, narrowest, widest, unit, cost, gap)
        if pair is None:
            break
        for row, by in pair:
            change(row, by)
    if not past:
        return widths, changes
    # A row so large that one bit of it is more than what is missing: the others make up for it.
    large = (possible & (unit > abs(gap))).nonzero().flatten().tolist()
    for row in sorted(large, key=lambda row: float(unit[row]))[:_MOST_TRIED]:
        trial, low, high = widths.clone(), narrowest.clone(), widest.clone()
        trial[row] += by
        low[row] = high[row] = trial[row]
        found, more = _approach(trial, low, high, cost, target, tolerance, price, past=False)
        if abs(cost(found) - target) <= tolerance:
            return found, [*changes, WidthChange(row, int(widths[row]), int(trial[row])), *more]
    return widths, changes


def _common_width(
    cost: WidthCost, target: float, own: Tensor, widths: Tensor, narrowest: Tensor, widest: Tensor
) -> Tensor:
    """The width, not a whole one, with which all of a cost's rows together cost the target; within each row's own."""
    low, high = float(narrowest[own].min()), float(widest[own].max())
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        common = torch.full_like(widths, middle).clamp(narrowest, widest)
        low, high = (low, middle) if cost(torch.where(own, common, widths)) > target else (middle, high)
    return torch.full_like(widths, low).clamp(narrowest, widest)


_LEAST = 1e-30
# Of eight bits, down to far below any tolerance.
_HALVINGS = 40
_MOST_TRIED = 8
# Beyond this many rows single bits are so small a part of the whole that no exchange is ever needed.
_MOST_ROWS = 2000


def _exchange(
    widths: Tensor, narrowest: Tensor, widest: Tensor, unit: Tensor, cost: WidthCost, gap: float
) -> list[tuple[int, int]] | None:
    """A bit less for one row and one more for another, so that the gap is least; ``None`` if none makes it smaller."""
    if not 1 < len(widths) <= _MOST_ROWS:
        return None
    down = (unit > 0) & (widths - 1 >= narrowest)
    up = (unit > 0) & (widths + 1 <= widest)
    after = (gap - unit[:, None] + unit[None, :]).abs()
    after[~(down[:, None] & up[None, :])] = torch.inf
    after.fill_diagonal_(torch.inf)
    best = int(after.argmin())
    row_down, row_up = divmod(best, len(widths))
    if not torch.isfinite(after[row_down, row_up]):
        return None
    trial = widths.clone()
    trial[row_down] -= 1
    trial[row_up] += 1
    nearer = abs(cost(trial) - cost(widths) + gap) < abs(gap) - 1e-6 * float(unit.max())
    return [(row_down, -1), (row_up, 1)] if nearer else None
