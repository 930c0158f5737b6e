"""Schedules: pure functions from an optimizer step of the run to a value."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal


def _exponential(t: float, first: float, last: float) -> float:
    if first <= 0 or last <= 0:
        raise ValueError(f"shape='exponential' needs values over 0, got {first} and {last}.")
    return first * (last / first) ** t


Shape = Literal["linear", "cosine", "exponential"]
# The value of each shape at t, over 0 and below 1, from the first value and the last.
SHAPES: dict[Shape, Callable[[float, float, float], float]] = {
    "linear": lambda t, first, last: first + t * (last - first),
    "cosine": lambda t, first, last: first + (1 - math.cos(math.pi * t)) / 2 * (last - first),
    "exponential": _exponential,
}


def resolve_point(name: str, point: int | float, total_steps: float) -> int:
    """Convert a point of a run to an optimizer step: an ``int`` is a step count, a ``float`` in [0, 1] a fraction.

    Args:
        name: Name of the argument, for error messages.
        point: Step count or fraction.
        total_steps: Optimizer steps of the run; ``inf`` if unknown.

    Raises:
        TypeError: ``point`` is not a number.
        ValueError: ``point`` is negative, a fraction over 1, or a fraction of a run of unknown length.

    Example:
        >>> resolve_point("start", 0.25, 1000), resolve_point("start", 30, 1000)
        (250, 30)
    """
    if isinstance(point, bool) or not isinstance(point, int | float):
        raise TypeError(f"{name} must be a step count (int) or a fraction of the run (float), got {point!r}.")
    if isinstance(point, int):
        if point < 0:
            raise ValueError(f"{name} must not be negative, got {point} steps.")
        return point
    if not 0 <= point <= 1:
        hint = f"; write {int(point)} for a step count" if math.isfinite(point) else ""
        raise ValueError(f"{name} as a float is a fraction of the run from 0.0 to 1.0, got {point}{hint}.")
    if point == 0:
        return 0
    if not math.isfinite(total_steps):
        raise ValueError(
            f"{name}={point} is a fraction of a run whose length is unknown: set the Trainer's max_steps, use a "
            "DataLoader with a length, or give a step count."
        )
    return round(point * total_steps)


def anneal(step: int, *, start: int, end: int, first: float, last: float, shape: Shape = "linear") -> float:
    """Value at ``step`` of a schedule that is ``first`` until ``start`` and ``last`` from ``end`` on.

    With ``t = (step - start)/(end - start)`` clamped to [0, 1]: linear is ``first + t (last - first)``, cosine
    the same with ``(1 - cos(pi t))/2`` for ``t``, and exponential is ``first (last/first)^t``.

    Raises:
        ValueError: an unknown shape, or an exponential one whose values are not both over 0.

    Example:
        >>> [anneal(s, start=10, end=20, first=1.0, last=0.5) for s in (0, 10, 15, 20, 99)]
        [1.0, 1.0, 0.75, 0.5, 0.5]
    """
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {tuple(SHAPES)}, got {shape!r}.")
    t = 1.0 if step >= end else 0.0 if step <= start else (step - start) / (end - start)
    if t in (0.0, 1.0):
        return last if t else first
    return SHAPES[shape](t, first, last)
