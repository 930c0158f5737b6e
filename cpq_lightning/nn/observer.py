"""Observers of activations: ranges for calibration, used levels and errors for reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cpq_lightning.functional.grid import level_bounds, signed_zero_point
from cpq_lightning.functional.grid_fit import GridFit, fit_histogram, fit_range, int8_kinds
from cpq_lightning.functional.ranges import bin_centers, histogram

BINS = 2**14


def pool(value: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    """All-reduce ``value`` in place if there are several ranks, so that all ranks decide alike."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value, op=op)
    return value


class RangeObserver:
    """Histogram of the input of an activation quantizer, in two passes: first the range, then the counts.

    Minima, maxima and integer counts are reduced exactly: several processes get the range that one process gets from
    all of their batches.
    """

    def __init__(self) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.counts: Tensor | None = None
        # For the kinds of grids in _KINDS and 1 to 8 bits: the smallest power-of-two scale that clips nothing, and
        # whether all values so far lie on its levels.
        self._power_scales: Tensor | None = None
        self._exact: Tensor | None = None
        self.per_sample = 0

    def update(self, x: Tensor) -> None:
        """Add one batch: its range, or after :meth:`close_range` its counts."""
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
        """End the first pass: reduce the range over all ranks and allocate the counts."""
        infinity = torch.tensor(float("inf"), device=device)
        low = pool((infinity if self.low is None else self.low).clone(), dist.ReduceOp.MIN)
        high = pool((-infinity if self.high is None else self.high).clone(), dist.ReduceOp.MAX)
        if not torch.isfinite(low) or not torch.isfinite(high):
            self.low = self.high = None
        else:
            self.low, self.high = low, high
            self._power_scales = _power_of_two_scales(low, high)
            self._exact = self._power_scales.isfinite()
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=device)

    def _note_exact(self, values: Tensor) -> None:
        assert self._power_scales is not None
        assert self._exact is not None
        # A few values exclude most tensors before all values are checked.
        for sample in (values[:256], values):
            for index in self._exact.flatten().nonzero().flatten().tolist():
                levels = sample / self._power_scales.flatten()[index]
                self._exact.view(-1)[index] = bool((levels == levels.round()).all())

    @property
    def has_values(self) -> bool:
        """Whether any finite value was observed; known after :meth:`close_range`."""
        return self.counts is not None and self.low is not None and self.high is not None

    def fit(self, widths: Sequence[int], rule: str, grid: str = "auto") -> list[GridFit] | None:
        """End the second pass: an initial grid for each width.

        ``None`` without values, or if all values are zero.

        Args:
            widths: The widths.
            rule: ``"mse"`` or ``"max"``, as in :class:`~cpq_lightning.CPQConfig`.
            grid: ``"auto"``, ``"signed"``, ``"unsigned"``, ``"offset"`` or ``"int8"``, in the same way.
        """
        if self.counts is None or self.low is None or self.high is None:
            return None
        counts = pool(self.counts, dist.ReduceOp.SUM)
        low, high = self.low, self.high
        if not low and not high:
            return None
        if rule == "max":
            return [fit_range(low, high, bits, grid) for bits in widths]
        centers, weights = bin_centers(low, high, BINS)[None], counts[None].double()
        exact = self._pooled_exact()
        fits = []
        for bits in widths:
            # Integers, masks and one-hot vectors have no error on such a grid; the histogram is too coarse to show it.
            kinds = {"auto": _KINDS, "offset": _KINDS, "int8": int8_kinds(bits)}.get(grid, (grid,))
            on_grid = [exact[kind, bits] for kind in kinds if (kind, bits) in exact]
            fits.append(on_grid[0] if on_grid else fit_histogram(centers, weights, bits, grid))
        return fits

    def _pooled_exact(self) -> dict[tuple[str, int], GridFit]:
        """The grids on which the values of all ranks lie, by kind and bits."""
        if self._power_scales is None or self._exact is None or self.low is None:
            return {}
        exact = pool(self._exact.int(), dist.ReduceOp.MIN).nonzero().tolist()
        found = {}
        for kind, index in exact:
            bits, scale = index + 1, self._power_scales[kind, index]
            offset = float((-self.low.clamp(max=0) / scale).round())
            zero_points = {"unsigned": 0.0, "signed": float(signed_zero_point(bits)), "offset": offset}
            found[_KINDS[kind], bits] = GridFit(scale.reshape(1), zero_points[_KINDS[kind]])
        return found


# The first one on which values lie is chosen.
_KINDS = ("unsigned", "signed", "offset")


def _power_of_two_scales(low: Tensor, high: Tensor) -> Tensor:
    """The smallest power-of-two scale whose grid clips nothing from ``low`` to ``high``, for each of _KINDS and 1 to 8
    bits, shape (3, 8); NaN where the grid has no level for values of one sign.
    """
    ends = torch.stack([low.clamp(max=0), high.clamp(min=0)])
    rows = []
    for zero_point in (lambda bits: 0, signed_zero_point):
        bounds = torch.tensor([level_bounds(bits, zero_point(bits)) for bits in range(1, 9)]).to(low)
        # Zero without values of this sign, infinite if there are values but no level for them.
        rows.append(torch.where(ends == 0, 0.0, ends / bounds).abs().amax(1))
    rows.append((ends[1] - ends[0]) / torch.tensor([2.0**bits - 1 for bits in range(1, 9)]).to(low))
    scales = torch.stack(rows)
    return torch.where((scales > 0) & scales.isfinite(), scales.log2().ceil().exp2(), torch.nan)


class Usage(NamedTuple):
    """Measurements of an activation quantizer.

    Attributes:
        used_levels: Number of levels that occurred.
        relative_error: ``sum (x - x_hat)^2 / sum x^2``.
        clipped: Share of values more than half the scale outside of the outermost levels.
        fresh_clipped: The same share after a new fit to these values at the same bits.
    """

    used_levels: int
    relative_error: float
    clipped: float
    fresh_clipped: float


class UsageRecorder:
    """Counts, over batches, the levels that an activation quantizer uses, its squared error, and its clipped values."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high
        self.counts = torch.zeros(int(high - low) + 1, dtype=torch.int64)
        self.error = 0.0
        self.power = 0.0
        self.clipped = 0

    def update(self, x: Tensor, quantized: Tensor, scale: Tensor) -> None:
        """Add one batch and its quantized values."""
        x, quantized = x.detach().float(), quantized.detach().float()
        level = (quantized / scale).round().long().flatten() - self.low
        self.counts += torch.bincount(level.clamp(0, len(self.counts) - 1), minlength=len(self.counts)).cpu()
        self.error += float((x - quantized).square().sum(dtype=torch.float64))
        self.power += float(x.square().sum(dtype=torch.float64))
        self.clipped += int(((x / scale > self.high + 0.5) | (x / scale < self.low - 0.5)).sum())

    @property
    def used_levels(self) -> int:
        """Number of levels that occurred."""
        return int((self.counts > 0).sum())

    @property
    def relative_error(self) -> float:
        """``sum (x - x_hat)^2 / sum x^2``."""
        return self.error / self.power if self.power else 0.0

    @property
    def clipped_share(self) -> float:
        """Share of values more than half the scale outside of the outermost levels."""
        return self.clipped / max(1, int(self.counts.sum()))
