"""A logistic distribution truncated to an interval of levels: its mass, its mean, and their derivatives.

It is the building block of :mod:`cpq_lightning.functional.categorical`. Results are accurate and finite at any distance
of the distribution's center from the interval, and the cost does not depend on the number of levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cpq_lightning.functional.modes import is_transformed

# The dtypes that sums are computed in.
PRECISIONS = (torch.float32, torch.float64)


@dataclass
class Interval:
    """A logistic around ``u`` truncated to the levels ``low … high``, relative to its level ``center`` nearest to u.

    Coordinates are reflected so that ``d = |u - center|``. For ``d > 1/2`` the interval lies on one side of u, and all
    masses have the factor ``y = exp(-(d - d0)/s)``, ``d0 = min(d, 1/2)``. It is left out (fields "over y"), so that
    masses are of order 1 at any distance of u and their ratios lose no digits.
    """

    center: Tensor
    side: Tensor  # +1 where u >= center, else -1
    d: Tensor
    d0: Tensor
    y: Tensor
    low: Tensor  # reflected, relative to center: low <= 0 <= high
    high: Tensor
    s_low: Tensor  # S at the lower boundary low - 1/2, over y
    r_high: Tensor  # 1 - S at the upper boundary high + 1/2
    mass: Tensor  # over y
    edge_low: Tensor  # d log mass / d z at the lower boundary, times -1
    edge_high: Tensor  # d log mass / d z at the upper boundary

    @classmethod
    def of(cls, u: Tensor, s: Tensor, low: Tensor | float, high: Tensor | float) -> Interval:
        center = u.round().clamp(low, high)  # type: ignore[arg-type]
        v = u - center
        side = torch.ones_like(v).copysign_(v)
        d = v.abs()
        d0 = d.clamp(max=0.5)
        y = torch.exp((d0 - d) / s)
        # Reflect the interval: its middle changes sign, its width does not change.
        middle, half = (low + high) / 2, (high - low) / 2
        lo = (middle - center).mul_(side)
        hi = lo + half
        lo = lo - half
        e = torch.exp((lo - 0.5 - d0) / s)
        g = torch.exp(-(hi + 0.5 - d0) / s)
        s_low = e / (1 + y * e)
        r_high = g / (y + g)
        # Beyond the edge (d > 1/2) hi is 0 and g = 1; inside, y = 1. One formula fits both cases without cancellation.
        mass = 1 / (y + g) - s_low
        return cls(
            center, side, d, d0, y, lo, hi, s_low, r_high, mass,
            edge_low=e / ((1 + y * e) ** 2 * mass),
            edge_high=g / ((y + g) ** 2 * mass),
        )  # fmt: skip

    def log_mass(self, s: Tensor) -> Tensor:
        """Log of the mass including the factor y, which cannot underflow here."""
        return self.mass.log() - (self.d - self.d0) / s

    def moments(self) -> tuple[Tensor, Tensor]:
        """Moments of d log mass / dz_t over the two boundaries: the sum, and the sum weighted with t - center."""
        k0 = self.side * (self.edge_high - self.edge_low)
        k1 = self.edge_high * (self.high + 0.5) - self.edge_low * (self.low - 0.5)
        return k0, k1

    def inner_boundaries(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean level relative to center (reflected), and sums over inner boundaries of S'_t and tau_t S'_t over mass.

        The mean is an Abel sum: (masses above each boundary right of center, minus masses below each boundary left of
        it) / mass. Terms decrease geometrically, as exp(-|t - u|/s), with the distance from the center.
        """
        decay = torch.exp(-1 / s)
        left = torch.exp((-0.5 - self.d0) / s)
        right = torch.exp((self.d0 - 0.5) / s)
        reach = _window(s)
        # Each inner boundary adds the mass beyond it minus the mass beyond the edge of the interval.
        mean = self.s_low * self.low.clamp(min=-reach).neg_() - self.r_high * self.high.clamp(max=reach)
        slope, slope_t = torch.zeros_like(mean), torch.zeros_like(mean)
        for j in range(reach):
            left.masked_fill_(self.low > -j - 0.5, 0.0)
            t = 1 + self.y * left
            mass = left / t
            slope_here = mass / t
            mean -= mass
            slope += slope_here
            slope_t.sub_(slope_here, alpha=j + 0.5)
            # Levels right of center exist only if u is inside, where y = 1.
            right.masked_fill_(self.high < j + 0.5, 0.0)
            t = 1 + right
            mass = right / t
            slope_here = mass / t
            mean += mass
            slope += slope_here
            slope_t.add_(slope_here, alpha=j + 0.5)
            left *= decay
            right *= decay
        return mean / self.mass, slope / self.mass, slope_t / self.mass


def _window(s: Tensor) -> int:
    """Number of boundaries on each side that determine the sum to rounding: c * s + 1, at most c + 1 as s <= 1.

    The values of s are read only on the CPU, outside compiled code and transforms, where that needs no synchronization.
    """
    # exp(-reach) is the weight of the first cell boundary that the expectation leaves out. The numbers are literals, as
    # torch 2.8 with dynamic shapes compiles a module constant as a symbolic number and fails in the loop over it.
    reach = 32.0 if s.dtype == torch.float64 else 15.0
    if s.device.type == "cpu" and not torch.compiler.is_compiling() and s.numel() > 0 and not is_transformed():
        reach *= min(1.0, s.max().item())
    return math.ceil(reach) + 1
