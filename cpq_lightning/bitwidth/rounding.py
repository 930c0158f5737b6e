"""Whole widths on a budget: the cheapest single changes that bring what was learned to its target, and not above it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cpq_lightning.bitwidth.cost import WidthCost


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
    """Change widths by single bits until they cost at most ``target``, and as little less as is found.

    Over the target the bit with the least price for what it saves is taken away, again and again. Then the bits that
    still fit are added, those that bring most for what they cost first, until none fits. Where that ends more than
    ``tolerance`` below the target, bits are exchanged between two rows, and one bit of a row that is too large for what
    is left, up or down, is made up for by the others. Rows that follow the mean of the others shall neither take bits
    from them, nor leave them any, by being whole: the others come first, to where the target is met by a mean that all
    have in common.

    Args:
        widths: Whole widths, shape (rows,), float64.
        narrowest: Least width of each row.
        widest: Greatest width of each row.
        cost: What widths cost. Rows that do not appear in it stay.
        target: What they may cost; where the narrowest cost more, these are what is returned.
        tolerance: How far below it they may stay, rather than that bits move between rows.
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
        >>> adjust_widths(four, two, eight, cost, 3.8, 0.01, price)
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
        led, changes = _approach(meant, low, high, _Limit(cost, target, whole=False), near, price)
        widths = torch.where(lead, led, widths)
        low, high = torch.where(follow, narrowest, widths), torch.where(follow, widest, widths)
        # All of them as near to it as whole widths are.
        away = lambda now, by: (now + by - meant).abs()  # noqa: E731
        widths, more = _approach(widths, low, high, _Limit(cost, target), tolerance, away)
        changes += more
    found, more = _approach(widths, narrowest, widest, _Limit(cost, target), tolerance, price)
    return found, changes + more


@dataclass(frozen=True)
class _Limit:
    """A cost that may not be over a target; ``whole``: whether of whole widths."""

    cost: WidthCost
    target: float
    whole: bool = True

    def room(self, widths: Tensor) -> float:
        """How far below the target widths are; less than 0 above it."""
        found = self.target - (self.cost.of_whole(widths) if self.whole else self.cost(widths))
        return 0.0 if abs(found) <= self._rounding else found

    @property
    def slack(self) -> float:
        """By how much more than what is left a bit may cost by its term, and fit."""
        return self._rounding + (self.cost.rounding if self.whole else 0.0)

    @property
    def _rounding(self) -> float:
        # A sum of many shares is off by that.
        return _ROUNDING * abs(self.target)


def _approach(
    widths: Tensor,
    narrowest: Tensor,
    widest: Tensor,
    limit: _Limit,
    tolerance: float,
    price: Callable[[Tensor, int], Tensor],
    moves_large: bool = True,
) -> tuple[Tensor, list[WidthChange]]:
    """:func:`adjust_widths` where no row follows others; ``moves_large``: whether large rows may go past the target."""
    widths, changes = widths.clone(), []

    def change(row: int, by: int) -> None:
        changes.append(WidthChange(row, int(widths[row]), int(widths[row]) + by))
        widths[row] += by

    while True:
        room, unit = limit.room(widths), limit.cost.gradient(widths)
        down, up = ((unit > 0) & (widths + by >= narrowest) & (widths + by <= widest) for by in (-1, 1))
        if room < 0:
            if not down.any():
                return widths, changes
            # What a bit saves beyond what is missing does not count for it: of what is as good the smallest is taken.
            ranked = _ranked(price(widths, -1), unit.clamp(max=-room), down)
            equal = ranked <= ranked.min() + 1e-9 * ranked.min().abs()
            change(int(torch.where(equal, unit, torch.inf).argmin()), -1)
            continue
        row = _fitting(widths, limit, room, unit, up, price)
        if row is not None:
            change(row, 1)
            continue
        if room <= tolerance:
            return widths, changes
        pair = _exchange(widths, down, up, unit, limit, room)
        if pair is not None:
            for row, by in zip(pair, (-1, 1), strict=True):
                change(row, by)
            continue
        if not moves_large:
            return widths, changes
        found = _large_moved(widths, narrowest, widest, limit, tolerance, price)
        if found is None:
            return widths, changes
        widths, more = found
        changes += more


def _large_moved(
    widths: Tensor,
    narrowest: Tensor,
    widest: Tensor,
    limit: _Limit,
    tolerance: float,
    price: Callable[[Tensor, int], Tensor],
) -> tuple[Tensor, list[WidthChange]] | None:
    """One bit of a row changed that alone costs more than what is left, or saves too much: the others make up for it.

    ``None`` where none brings the cost nearer to its target.
    """
    room, unit = limit.room(widths), limit.cost.gradient(widths)
    best = None
    for by in (1, -1):
        possible = (unit > 0) & (widths + by >= narrowest) & (widths + by <= widest)
        rows = possible.nonzero().flatten().tolist()
        for row in sorted(rows, key=lambda row: float(unit[row]))[:_MOST_TRIED]:
            trial, low, high = widths.clone(), narrowest.clone(), widest.clone()
            trial[row] += by
            low[row] = high[row] = trial[row]
            found, more = _approach(trial, low, high, limit, tolerance, price, moves_large=False)
            left = limit.room(found)
            if 0 <= left < room - 1e-6 * float(unit.max()):
                room, best = left, (found, [WidthChange(row, int(widths[row]), int(trial[row])), *more])
            if room <= tolerance:
                return best
    return best


def _ranked(prices: Tensor, saved: Tensor, possible: Tensor) -> Tensor:
    """Prices for each unit of cost, infinite where a change is not possible."""
    # Of what costs nothing the largest.
    prices = torch.where(prices >= 0, prices.clamp(min=_LEAST), prices)
    return torch.where(possible, prices / saved.clamp(min=1e-300), torch.inf)


def _fitting(
    widths: Tensor, limit: _Limit, room: float, unit: Tensor, up: Tensor, price: Callable[[Tensor, int], Tensor]
) -> int | None:
    """The row whose next bit brings most for what it costs, of those that still fit."""
    fits = up & (unit <= room + limit.slack)
    if not fits.any():
        return None
    ranked = _ranked(price(widths, 1), unit, fits)
    for row in ranked.argsort(stable=True)[: int(fits.sum())].tolist():
        trial = widths.clone()
        trial[row] += 1
        if limit.room(trial) >= 0:
            return row
    return None


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
# Of a target.
_ROUNDING = 1e-12
# Of eight bits, down to the last digit.
_HALVINGS = 60
_MOST_TRIED = 8
# Beyond this many rows single bits are so small a part of the whole that no exchange is ever needed.
_MOST_ROWS = 2000


def _exchange(
    widths: Tensor, down: Tensor, up: Tensor, unit: Tensor, limit: _Limit, room: float
) -> tuple[int, int] | None:
    """A row that loses a bit and one that gains one, so that least room is left; ``None`` if none leaves less."""
    if not 1 < len(widths) <= _MOST_ROWS:
        return None
    after = room + unit[:, None] - unit[None, :]
    possible = down[:, None] & up[None, :] & (after >= -limit.slack) & (after < room - 1e-6 * float(unit.max()))
    after[~possible.fill_diagonal_(False)] = torch.inf
    # Where the two are multiplied, an exchange costs other than the sum of its parts.
    for place in after.flatten().argsort()[: min(_MOST_TRIED, int(possible.sum()))].tolist():
        pair = divmod(place, len(widths))
        trial = widths.clone()
        trial[pair[0]] -= 1
        trial[pair[1]] += 1
        if 0 <= limit.room(trial) < room - 1e-6 * float(unit.max()):
            return pair
    return None
