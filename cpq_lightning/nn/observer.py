"""What is learned about activations by looking at batches: ranges before training, levels in use after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from cpq_lightning.functional import bin_centers, fit_step, histogram, max_step

BINS = 2**14
# Rounding in a kernel that cannot give negative values in exact arithmetic must not cost half of the grid.
_NEGLIGIBLE = 1e-6


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

    def close_range(self, device: torch.device) -> None:
        """End the first pass: pool the range over all ranks and make room for the counts."""
        infinity = torch.tensor(float("inf"), device=device)
        low = pool((infinity if self.low is None else self.low).clone(), dist.ReduceOp.MIN)
        high = pool((-infinity if self.high is None else self.high).clone(), dist.ReduceOp.MAX)
        if not torch.isfinite(low) or not torch.isfinite(high):
            self.low = self.high = None
        else:
            self.low, self.high = low, high
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=device)

    def fit(self, widths: Sequence[int], rule: str) -> tuple[list[Tensor], bool] | None:
        """End the second pass: a starting step of each width, shape (1,), and whether the grid is signed; ``None`` of
        no value.
        """
        if self.counts is None or self.low is None or self.high is None:
            return None
        counts = pool(self.counts, dist.ReduceOp.SUM)
        low, high = self.low, self.high
        signed = bool(low < -_NEGLIGIBLE * high.abs())
        if rule == "max":
            return [max_step(low, high, bits, signed).reshape(1) for bits in widths], signed
        centers = bin_centers(low, high, BINS)
        return [fit_step(centers[None], bits, signed, counts[None].double()) for bits in widths], signed


class UsageRecorder:
    """Which levels an activation quantizer uses, and its relative squared error, over the batches it is shown."""

    def __init__(self, low: int, high: int) -> None:
        self.low = low
        self.counts = torch.zeros(high - low + 1, dtype=torch.int64)
        self.error = 0.0
        self.power = 0.0

    def update(self, x: Tensor, quantized: Tensor, step: Tensor) -> None:
        """Take in one batch and what it was quantized to."""
        x, quantized = x.detach().float(), quantized.detach().float()
        level = (quantized / step).round().long().flatten() - self.low
        self.counts += torch.bincount(level.clamp(0, len(self.counts) - 1), minlength=len(self.counts)).cpu()
        self.error += float((x - quantized).square().sum(dtype=torch.float64))
        self.power += float(x.square().sum(dtype=torch.float64))

    @property
    def used_levels(self) -> int:
        """How many levels have occurred."""
        return int((self.counts > 0).sum())

    @property
    def relative_error(self) -> float:
        """``sum (x - x_hat)^2 / sum x^2``."""
        return self.error / self.power if self.power else 0.0
