"""What is learned about activations by looking at batches: ranges before training, levels in use after it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cpq_lightning.functional.grid import level_bounds
from cpq_lightning.functional.ranges import bin_centers, histogram, max_scale, mse_scale

BINS = 2**14
# Rounding in a kernel that cannot give negative values in exact arithmetic must not cost half of the grid.
_NEGLIGIBLE = 1e-6
# What is no error to float32, of the square.
_LEAST_ERROR = 1e-14


def pool(value: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    """The value over all ranks, where there are several: what is decided from it is then the same on each."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value, op=op)
    return value


class RangeObserver:
    """Histogram of the values that an activation quantizer sees, in two passes: first the range, then the counts.

    Minima, maxima and integer counts pool exactly: several processes get the range that one process gets on the
    union of their batches.
    """

    def __init__(self) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.counts: Tensor | None = None
        # Of grids without and with negative levels, at 1 to 8 bits: the power of two that clips nothing, and whether
        # all values so far lie on its levels.
        self._powers: Tensor | None = None
        self._exact: Tensor | None = None
        self.per_sample = 0

    def update(self, x: Tensor) -> None:
        """Take in one batch: its range, or after :meth:`close_range` its counts."""
        values = x.detach()
        values = values[torch.isfinite(values)].float()
        self.per_sample = x[0].numel() if x.dim() > 1 and len(x) else x.numel()
        if values.numel() == 0:
            return
        if self.counts is None:
            low, high = values.aminmax()
            self.low = low if self.low is None else torch.minimum(self.low, low)
            self.high = high if self.high is None else torch.maximum(self.high, high)
        elif self.low is not None and self.high is not None:
            self.counts += histogram(values, self.low, self.high, BINS)
            self._note_exact(values)

    def close_range(self, device: torch.device) -> None:
        """End the first pass: pool the range over all ranks and make room for the counts."""
        infinity = torch.tensor(float("inf"), device=device)
        low = pool((infinity if self.low is None else self.low).clone(), dist.ReduceOp.MIN)
        high = pool((-infinity if self.high is None else self.high).clone(), dist.ReduceOp.MAX)
        if not torch.isfinite(low) or not torch.isfinite(high):
            self.low = self.high = None
        else:
            self.low, self.high = low, high
            self._powers = _power_steps(low, high)
            self._exact = self._powers.isfinite()
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=device)

    def _note_exact(self, values: Tensor) -> None:
        assert self._powers is not None
        assert self._exact is not None
        # Most tensors of real numbers show it in a few values.
        for sample in (values[:256], values):
            held = self._exact.flatten().nonzero().flatten().tolist()
            for place in held:
                levels = sample / self._powers.flatten()[place]
                self._exact.view(-1)[place] = bool((levels == levels.round()).all())

    @property
    def has_values(self) -> bool:
        """Whether there was any value, once the range is closed."""
        return self.counts is not None and self.low is not None and self.high is not None

    def fit(self, widths: Sequence[int], rule: str) -> tuple[list[Tensor], bool] | None:
        """End the second pass: a starting step of each width, shape (1,), and whether the grid is signed; ``None`` of
        no value, or of zeros alone.

        Of the two kinds of grid it is the one with less error, over all widths; by the rule ``"max"``, which clips
        nothing, the unsigned one only where no value is negative.
        """
        if self.counts is None or self.low is None or self.high is None:
            return None
        counts = pool(self.counts, dist.ReduceOp.SUM)
        low, high = self.low, self.high
        if not low and not high:
            return None
        if rule == "max":
            signed = bool(low < -_NEGLIGIBLE * high.abs())
            return [max_scale(low, high, bits, signed).reshape(1) for bits in widths], signed
        centers, weights = bin_centers(low, high, BINS)[None], counts[None].double()
        grids = [signed for signed in (False, True) if signed or high > 0]
        exact = self._pooled_exact()
        fits: dict[bool, list[Tensor]] = {}
        errors: dict[bool, float] = {}
        for signed in grids:
            # Whole numbers, masks and one-hot vectors have no error there, which a histogram is too coarse to show.
            found = [exact.get((signed, bits)) for bits in widths]
            fits[signed] = [
                mse_scale(centers, bits, signed, weights) if step is None else step
                for bits, step in zip(widths, found, strict=True)
            ]
            errors[signed] = sum(
                math.log(_LEAST_ERROR if at is not None else _error(centers, weights, step, bits, signed))
                for bits, step, at in zip(widths, fits[signed], found, strict=True)
            )
        signed = min(grids, key=lambda kind: errors[kind])
        return fits[signed], signed

    def _pooled_exact(self) -> dict[tuple[bool, int], Tensor]:
        """Steps, shape (1,), of the grids that all values of all ranks lie on, by sign and width."""
        if self._powers is None or self._exact is None:
            return {}
        held = pool(self._exact.int(), dist.ReduceOp.MIN).nonzero().tolist()
        return {(bool(signed), place + 1): self._powers[signed, place].reshape(1) for signed, place in held}


def _power_steps(low: Tensor, high: Tensor) -> Tensor:
    """The smallest power of two whose grid clips nothing from ``low`` to ``high``, unsigned and signed, at 1 to 8 bits,
    shape (2, 8); NaN where the grid has no level on a side that has values.
    """
    rows = []
    for signed in (False, True):
        bounds = torch.tensor([level_bounds(bits, signed) for bits in range(1, 9)]).to(low)
        ends = torch.stack([low.clamp(max=0), high.clamp(min=0)])
        # Zero where there is nothing to hold, infinite where there is no level to hold it.
        steps = torch.where(ends == 0, 0.0, ends / bounds).abs().amax(1)
        rows.append(torch.where((steps > 0) & steps.isfinite(), steps.log2().ceil().exp2(), torch.nan))
    return torch.stack(rows)


def _error(values: Tensor, counts: Tensor, step: Tensor, bits: int, signed: bool) -> float:
    """Squared error over that of zeros, at least what is no error to float32."""
    quantized = (values / step[:, None]).round().clamp(*level_bounds(bits, signed)) * step[:, None]
    error = ((values - quantized).double().square() * counts).sum() / (values.double().square() * counts).sum()
    return max(float(error), _LEAST_ERROR)


class Usage(NamedTuple):
    """What was measured of an activation quantizer.

    Attributes:
        used_levels: How many levels have occurred.
        relative_error: ``sum (x - x_hat)^2 / sum x^2``.
        clipped: Share of values more than half a step outside of the last level.
        fresh_clipped: The same after a fresh fit to these values at the same bits.
    """

    used_levels: int
    relative_error: float
    clipped: float
    fresh_clipped: float


class UsageRecorder:
    """Which levels an activation quantizer uses, its relative squared error, and what lies beyond its grid, over the
    batches it is shown.
    """

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high
        self.counts = torch.zeros(high - low + 1, dtype=torch.int64)
        self.error = 0.0
        self.power = 0.0
        self.clipped = 0

    def update(self, x: Tensor, quantized: Tensor, step: Tensor) -> None:
        """Take in one batch and what it was quantized to."""
        x, quantized = x.detach().float(), quantized.detach().float()
        level = (quantized / step).round().long().flatten() - self.low
        self.counts += torch.bincount(level.clamp(0, len(self.counts) - 1), minlength=len(self.counts)).cpu()
        self.error += float((x - quantized).square().sum(dtype=torch.float64))
        self.power += float(x.square().sum(dtype=torch.float64))
        self.clipped += int(((x / step > self.high + 0.5) | (x / step < self.low - 0.5)).sum())

    @property
    def used_levels(self) -> int:
        """How many levels have occurred."""
        return int((self.counts > 0).sum())

    @property
    def relative_error(self) -> float:
        """``sum (x - x_hat)^2 / sum x^2``."""
        return self.error / self.power if self.power else 0.0

    @property
    def clipped_share(self) -> float:
        """The share of values more than half a step outside of the last level."""
        return self.clipped / max(1, int(self.counts.sum()))
