"""Means and paired differences over seeds, with their 95 % intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

_LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean of some runs.

    Attributes:
        mean: In the unit of the values.
        half: Half of the 95 % interval of Student's t; ``None`` of a single value.
        count: How many values.
    """

    mean: float
    half: float | None
    count: int

    def shown(self, sign: str = "") -> str:
        """For people; ``sign="+"`` shows a difference's."""
        return f"{self.mean:{sign}.2f}" + ("" if self.half is None else f" ± {self.half:.2f}")

    @property
    def above(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.half is not None and self.mean - self.half > 0

    @property
    def below(self) -> bool:
        """Whether the whole interval lies below zero."""
        return self.half is not None and self.mean + self.half < 0


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and interval; ``None`` of nothing.

    Example:
        >>> estimate([1.0, 2.0, 3.0])
        Estimate(mean=2.0, half=2.484..., count=3)
    """
    if not len(values):
        return None
    if len(values) == 1:
        return Estimate(float(values[0]), None, 1)
    half = stats.t.ppf((1 + _LEVEL) / 2, len(values) - 1) * stats.sem(values)
    return Estimate(float(np.mean(values)), float(half), len(values))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Of the differences at the seeds that both have; ``None`` if they have none in common.

    Args:
        ours: A value for each seed.
        theirs: Likewise.

    Example:
        >>> paired({0: 2.0, 1: 3.0, 2: 9.0}, {0: 1.0, 1: 2.0}).mean
        1.0
    """
    return estimate([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])


def no_worse(ours: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[int, int]:
    """At how many of the seeds that both have ours is at least theirs, and how many these are.

    Example:
        >>> no_worse({0: 2.0, 1: 3.0, 2: 9.0}, {0: 1.0, 1: 4.0})
        (1, 2)
    """
    common = ours.keys() & theirs.keys()
    return sum(ours[seed] >= theirs[seed] for seed in common), len(common)


def variance_ratio(ours: float, theirs: float, our_freedom: int, their_freedom: int) -> tuple[float, float]:
    """The 95 % interval of a ratio of two variances, by the F distribution.

    Args:
        ours: The variance above.
        theirs: The one below, over 0.
        our_freedom: Degrees of freedom that the first was estimated with.
        their_freedom: Those of the second.

    Example:
        >>> [round(end, 2) for end in variance_ratio(2.0, 1.0, 30, 30)]
        [0.96, 4.15]
    """
    low, high = stats.f.ppf([(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], our_freedom, their_freedom)
    return float(ours / theirs / high), float(ours / theirs / low)
