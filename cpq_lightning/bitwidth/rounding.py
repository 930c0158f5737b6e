"""Integer widths on a budget: the cheapest one-bit changes that bring the learned widths to the target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cpq_lightning.bitwidth.cost import WidthCost


@dataclass(frozen=True)
class WidthChange:
    """A change of one width by one bit."""

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
    """Change widths by single bits until they cost at most ``target``, and as close to it as the search gets.

    1. While the cost is over the target, remove the bit with the least price for each unit of cost saved.
    2. Add bits that still fit, those with the largest gain for each unit of cost first, until none fits.
    3. If the cost is then more than ``tolerance`` below the target, exchange bits between two rows. After that, change
       one bit of a row whose bit alone is too large for the remaining room, and let the other rows compensate.

    Some rows have no information of their own, for example because they had no gradient. Their width is the mean width
    of the rows that have it. Rounding them must not change the budget of the rows that have it. Therefore the rows with
    information are adjusted first, while the others share one width, with which the cost meets the target.

    Args:
        widths: Integer widths, shape (rows,), float64.
        narrowest: Minimum width of each row.
        widest: Maximum width of each row.
        cost: The cost of the widths. Rows that do not appear in it are not changed.
        target: The maximum cost. If the narrowest widths cost more, they are returned.
        tolerance: How far below the target the cost may stay before bits are exchanged between rows.
        price: ``price(widths, ±1)``, the price to the network of a change of each row by one bit, in any unit; a
            negative price is a gain.
        follows: True for a row without information of its own, which gets the mean width of the rows that are False;
            shape (rows,), bool.

    Returns:
        The new widths, and the changes in order.

    Example:
        >>> rows = torch.arange(2)
        >>> cost = WidthCost(torch.tensor([0.5, 0.5]).double(), rows, torch.tensor([2, 2]), 0.0)
        >>> four, two, eight = (torch.full((2,), b).double() for b in (4.0, 2.0, 8.0))
        >>> price = lambda widths, by: torch.tensor([2.0, 1.0]).double()
        >>> adjust_widths(four, two, eight, cost, 3.8, 0.01, price)
        (tensor([4., 3.], dtype=torch.float64), [WidthChange(row=1, before=4, after=3)])
    """
    changes: list[WidthChange] = []
    counted = cost.gradient(widths) > 0
    follow = counted & follows if follows is not None else torch.zeros_like(counted)
    lead = counted & ~follow
    if lead.any() and follow.any():
        ideal = torch.where(follow, _common_width(cost, target, counted, widths, narrowest, widest), widths)
        unit = cost.gradient(ideal)
        # Their tolerance is their share of that of all rows.
        share = tolerance * float(unit[lead].sum() / unit[counted].sum())
        low, high = torch.where(lead, narrowest, ideal), torch.where(lead, widest, ideal)
        adjusted, changes = _approach(ideal, low, high, _Limit(cost, target, exact=False), share, price)
        widths = torch.where(lead, adjusted, widths)
        low, high = torch.where(follow, narrowest, widths), torch.where(follow, widest, widths)
        # Followers become the integer widths closest to the common width.
        distance = lambda now, by: (now + by - ideal).abs()  # noqa: E731
        widths, more = _approach(widths, low, high, _Limit(cost, target), tolerance, distance)
        changes += more
    widths, more = _approach(widths, narrowest, widest, _Limit(cost, target), tolerance, price)
    return widths, changes + more


@dataclass(frozen=True)
class _Limit:
    """A cost with its maximum ``target``; ``exact``: whether widths are integers, with the exact cost of a file."""

    cost: WidthCost
    target: float
    exact: bool = True

    def room(self, widths: Tensor) -> float:
        """The target minus the cost of ``widths``; negative above the target."""
        room = self.target - (self.cost.of_integer_widths(widths) if self.exact else self.cost(widths))
        return 0.0 if abs(room) <= self._rounding else room

    @property
    def slack(self) -> float:
        """By how much the term of a bit may exceed the remaining room although the bit may fit."""
        return self._rounding + (self.cost.rounding if self.exact else 0.0)

    @property
    def _rounding(self) -> float:
        # The rounding error of a sum of many terms.
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
    """Run :func:`adjust_widths` without followers; ``moves_large``: whether to try bits too large for the room."""
    widths, changes = widths.clone(), []

    def change(row: int, by: int) -> None:
        changes.append(WidthChange(row, int(widths[row]), int(widths[row]) + by))
        widths[row] += by

    while True:
        room, unit = limit.room(widths), limit.cost.gradient(widths)
        down, up = (_possible(widths, by, narrowest, widest, unit) for by in (-1, 1))
        if room < 0:
            if not down.any():
                return widths, changes
            # Savings beyond the excess do not count. Of equally good bits the smallest is removed.
            ranked = _price_per_cost(price(widths, -1), unit.clamp(max=-room), down)
            equal = ranked <= ranked.min() + 1e-9 * ranked.min().abs()
            change(int(torch.where(equal, unit, torch.inf).argmin()), -1)
            continue
        row = _best_fitting(widths, limit, room, unit, up, price)
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
        result = _change_large(widths, narrowest, widest, limit, tolerance, price)
        if result is None:
            return widths, changes
        widths, more = result
        changes += more


def _possible(widths: Tensor, by: int, narrowest: Tensor, widest: Tensor, unit: Tensor) -> Tensor:
    """The rows whose width may change by ``by``: it stays in its range, and the cost depends on it."""
    return (unit > 0) & (widths + by >= narrowest) & (widths + by <= widest)


def _change_large(
    widths: Tensor,
    narrowest: Tensor,
    widest: Tensor,
    limit: _Limit,
    tolerance: float,
    price: Callable[[Tensor, int], Tensor],
) -> tuple[Tensor, list[WidthChange]] | None:
    """Change one bit that alone costs more than the remaining room, or saves too much, and let other rows compensate.

    ``None`` if no such change brings the cost closer to the target.
    """
    room, unit = limit.room(widths), limit.cost.gradient(widths)
    best = None
    for by in (1, -1):
        rows = _possible(widths, by, narrowest, widest, unit).nonzero().flatten().tolist()
        for row in sorted(rows, key=lambda row: float(unit[row]))[:_MAX_TRIALS]:
            trial, low, high = widths.clone(), narrowest.clone(), widest.clone()
            trial[row] += by
            low[row] = high[row] = trial[row]
            changed, more = _approach(trial, low, high, limit, tolerance, price, moves_large=False)
            left = limit.room(changed)
            if 0 <= left < room - 1e-6 * float(unit.max()):
                room, best = left, (changed, [WidthChange(row, int(widths[row]), int(trial[row])), *more])
            if room <= tolerance:
                return best
    return best


def _price_per_cost(prices: Tensor, saved: Tensor, possible: Tensor) -> Tensor:
    """Price for each unit of cost saved, infinite where a change is not possible."""
    # Of several bits at price 0 the one that saves most ranks first.
    prices = torch.where(prices >= 0, prices.clamp(min=_MIN_PRICE), prices)
    return torch.where(possible, prices / saved.clamp(min=1e-300), torch.inf)


def _best_fitting(
    widths: Tensor, limit: _Limit, room: float, unit: Tensor, up: Tensor, price: Callable[[Tensor, int], Tensor]
) -> int | None:
    """The row whose next bit fits with the largest gain for each unit of cost; ``None`` if none fits."""
    fits = up & (unit <= room + limit.slack)
    if not fits.any():
        return None
    ranked = _price_per_cost(price(widths, 1), unit, fits)
    for row in ranked.argsort(stable=True)[: int(fits.sum())].tolist():
        trial = widths.clone()
        trial[row] += 1
        if limit.room(trial) >= 0:
            return row
    return None


def _common_width(
    cost: WidthCost, target: float, counted: Tensor, widths: Tensor, narrowest: Tensor, widest: Tensor
) -> Tensor:
    """The common width, in general not an integer, at which the ``counted`` rows cost the target, clamped to the range
    of each row.
    """
    low, high = float(narrowest[counted].min()), float(widest[counted].max())
    for _ in range(_BISECTION_STEPS):
        middle = (low + high) / 2
        common = torch.full_like(widths, middle).clamp(narrowest, widest)
        low, high = (low, middle) if cost(torch.where(counted, common, widths)) > target else (middle, high)
    return torch.full_like(widths, low).clamp(narrowest, widest)


_MIN_PRICE = 1e-30
# Rounding error of a cost, relative to the target.
_ROUNDING = 1e-12
# Enough for a width of up to 8 bits in full float64 precision.
_BISECTION_STEPS = 60
_MAX_TRIALS = 8
# With more rows than this a single bit is so small a part of the cost that no exchange is needed.
_MAX_EXCHANGE_ROWS = 2000


def _exchange(
    widths: Tensor, down: Tensor, up: Tensor, unit: Tensor, limit: _Limit, room: float
) -> tuple[int, int] | None:
    """The rows that lose and gain a bit so that the least room remains; ``None`` if no exchange reduces the room."""
    if not 1 < len(widths) <= _MAX_EXCHANGE_ROWS:
        return None
    after = room + unit[:, None] - unit[None, :]
    possible = down[:, None] & up[None, :] & (after >= -limit.slack) & (after < room - 1e-6 * float(unit.max()))
    after[~possible.fill_diagonal_(False)] = torch.inf
    # If a term multiplies both widths, an exchange does not cost the sum of its two changes.
    for index in after.flatten().argsort()[: min(_MAX_TRIALS, int(possible.sum()))].tolist():
        pair = divmod(index, len(widths))
        trial = widths.clone()
        trial[pair[0]] -= 1
        trial[pair[1]] += 1
        if 0 <= limit.room(trial) < room - 1e-6 * float(unit.max()):
            return pair
    return None
