"""Ranges that training has outgrown: looked at ever more rarely, and fitted anew where they are stale (ours)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from cpq_lightning.attach.layers import QuantizedLayer, quantized_layers, quantizers
from cpq_lightning.functional.grid import level_bounds
from cpq_lightning.functional.ranges import bin_centers, clipped_share, grid_errors, histogram, max_scale, mse_scale
from cpq_lightning.nn.observer import pool
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.nn.scale_init import even_stride
from cpq_lightning.nn.sharding import full_tensor
from cpq_lightning.nn.watch import Watcher

# After so large a share of the steps so far, at most, ranges are looked at again.
_SPACING = 1 / 8
# A range is stale where it costs a bit: one bit less has four times the squared error.
_FACTOR = 4.0
# An error this small, relative to the values' power, is no reason: what is better on one batch may not be on the next.
_ENOUGH = 1e-4
# Values of a weight (of each of its rows, where they have a scale each) and of an activation in one call that are
# looked at, and cells of an activation's histogram.
_WEIGHTS, _INPUTS, _BINS = 2**12, 2**15, 2**12
# Rounding in a kernel that cannot give negative values in exact arithmetic must not cost half of the grid.
_NEGLIGIBLE = 1e-6
# Scales relative to that of the whole range: one of them is within 12 % of the best, and its error within a few percent
# of the least, at a twentieth of a fit's cost.
_LADDER = torch.logspace(-5, 0, 16, base=2)


def is_due(step: int) -> bool:
    """Whether ranges are looked at behind this step, 0 being the first: a function of nothing else.

    Each of the first 16 steps is, then 8 times while the number of steps doubles: 36 times in 100 steps, 63 in 1,000,
    116 in 100,000. Ranges of random weights grow by a factor of two within less than a doubling of the steps.

    Example:
        >>> [s + 1 for s in range(40) if is_due(s)][14:]
        [15, 16, 18, 20, 22, 24, 26, 28, 30, 32, 36, 40]
    """
    if step < 0:
        return False
    done = step + 1
    # Distances are powers of two, so that no check needs to know when the last one was.
    return done % 2 ** max(0, math.floor(math.log2(done * _SPACING))) == 0


class RangeTracker:
    """Fits a quantizer's range anew once training has outgrown it: from random weights it does so many times over.

    A range is stale where its squared error, on the weight as it is behind a step or on the inputs of the step's own
    batches, is more than four times the least at the same bits: as if it had a bit less. The least counts as no less
    than the noise of rounding, a twelfth of a squared scale for each value, because few values can be fitted by chance;
    and an error below 1e-4 of the values' power is good enough.
    What is fitted anew is the starting scale, of each width; the noise that was learned stays.

    ``step`` counts optimizer steps from where quantization began, and nothing else is remembered from one step to the
    next: a resumed run looks when, and decides what, the uninterrupted one does. Batches whose gradients are
    accumulated call :meth:`before_batch` with the same step, and :meth:`after_step` follows the last of them.

    Args:
        model: An attached model.
        optimizers: Those that hold the quantizers' parameters: momentum of a scale that is fitted anew belongs to the
            old one.
        inputs: Whether to look at activations too, on which several processes have to agree.

    Example:
        >>> from cpq_lightning import CPQConfig, attach
        >>> model = attach(nn.Linear(4, 4), CPQConfig(weight_bits=4))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> tracker = RangeTracker(model, [optimizer])
        >>> tracker.before_batch(0)
        >>> model(torch.randn(2, 4)).sum().backward()
        >>> optimizer.step()
        >>> tracker.after_step(0)
        []
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[Optimizer] = (), *, inputs: bool = True) -> None:
        self.model = model
        self.optimizers = list(optimizers)
        self.inputs = inputs
        self._sampling: InputSampler | None = None

    def before_batch(self, step: int) -> None:
        """Watch what activations the forwards that follow in this thread quantize, where ``step`` is due."""
        if not self.inputs or not is_due(step):
            return
        self.pause()
        if self._sampling is None:
            found = [q for _, q in quantizers(self.model) if q.kind == "activation" and _renewable(q)]
            self._sampling = InputSampler(found)
        self._sampling.__enter__()

    def pause(self) -> None:
        """Watch no longer; what was seen counts at the next :meth:`after_step`."""
        if self._sampling is not None:
            self._sampling.__exit__(None, None, None)

    def forget(self) -> None:
        """Forget what was seen."""
        self.pause()
        self._sampling = None

    @torch.no_grad()
    def after_step(self, step: int) -> list[str]:
        """Look at all ranges, where ``step`` is due; on all processes at once.

        Returns:
            Names of the quantizers whose range is another now.
        """
        self.pause()
        sampled, self._sampling = self._sampling, None
        if not is_due(step):
            return []
        found = self.renew_weights()
        for q, rows, counts in sampled_inputs(sampled) if sampled is not None else ():
            if self._renew(q, rows, counts):
                found.add(q)
        return [name for name, q in quantizers(self.model) if q in found]

    @torch.no_grad()
    def propose(self) -> None:
        """Keep, with the quantizers, ranges of inputs that the forwards so far have outgrown, for the next step."""
        for q, rows, counts in sampled_inputs(self._sampling) if self._sampling is not None else ():
            stale, signed = _stale(q, rows, counts)
            if stale.any():
                q.propose(_fit(q, rows, counts, signed), signed)

    @torch.no_grad()
    def renew_weights(self, frozen: bool = False) -> set[Quantizer]:
        """Look at the weights alone, whatever the step: quantizers whose range is another now.

        Args:
            frozen: Whether at those of layers that do not train, too: somebody may have rewritten them.
        """
        return {q for q, rows in _weights(self.model, frozen) if self._renew(q, rows, None)}

    def _renew(self, q: Quantizer, rows: Tensor, counts: Tensor | None) -> bool:
        if not rows.numel():
            return False
        stale, signed = _stale(q, rows, counts)
        if not stale.any():
            return False
        q.renew(_fit(q, rows, counts, signed), stale, signed)
        self._forget(q.log_scale, stale)
        return True

    def _forget(self, parameter: Tensor, stale: Tensor) -> None:
        for optimizer in self.optimizers:
            if parameter not in optimizer.state:
                continue
            if stale.all():
                del optimizer.state[parameter]
                continue
            # Of some channels: their part of what is held for each element.
            for value in optimizer.state[parameter].values():
                if isinstance(value, Tensor) and value.shape == stale.shape:
                    value.masked_fill_(stale, 0.0)


def _weights(model: nn.Module, frozen: bool) -> Iterator[tuple[Quantizer, Tensor]]:
    # A weight that is shared is looked at once.
    for q, layer in {layer.weight_quantizer: layer for _, layer in quantized_layers(model)}.items():
        if _renewable(q, frozen):
            yield q, weight_rows(layer, len(q.log_scale))


@torch.no_grad()
def rewritten_weights(model: nn.Module) -> list[str]:
    """Names of the layers whose weight has left the range that was fitted to it, by the rule of
    :class:`RangeTracker`.
    """
    stale = {q for q, rows in _weights(model, frozen=True) if rows.numel() and bool(_stale(q, rows, None)[0].any())}
    return [name for name, layer in quantized_layers(model) if layer.weight_quantizer in stale]


def _renewable(q: Quantizer, frozen: bool = False) -> bool:
    """Not before it has a range, and not of a frozen layer."""
    return q.active and q.fitted and (frozen or q.log_scale.requires_grad)


def _fit(q: Quantizer, rows: Tensor, counts: Tensor | None, signed: bool) -> list[Tensor]:
    if q.range_rule == "max":
        return [max_scale(rows.amin(1), rows.amax(1), k, signed) for k in q.fitted_widths]
    return [mse_scale(rows, k, signed, counts) for k in q.fitted_widths]


def _stale(q: Quantizer, rows: Tensor, counts: Tensor | None) -> tuple[Tensor, bool]:
    """Of each row, whether its range is stale; and whether the better grid is signed.

    One that is signed stays so: a later batch may bring negative values back, and would lose more than a bit without.
    """
    there = rows.ne(0).double() if counts is None else counts * rows.ne(0)
    there = there.sum(1, dtype=torch.float64)
    low, high = rows.amin(1), rows.amax(1)
    step = q.step()
    if q.range_rule == "max":
        signed = q.signed or bool((low < -_NEGLIGIBLE * high.abs()).any())
        full = max_scale(low, high, q.bits, signed)
        # Batches differ in their highest value.
        return (there > 0) & ((full > 1.25 * step) | (full < step / 2)), signed
    now = grid_errors(rows, counts, step[:, None], *level_bounds(q.bits, q.signed))[:, 0]
    best, signed = _least(q, rows, counts, there, q.signed), q.signed
    if not signed and bool((low < 0).any()):
        with_negatives = _least(q, rows, counts, there, True)
        if bool((with_negatives < best).all()):
            best, signed = with_negatives, True
    squares = rows.double().square() if counts is None else rows.double().square() * counts
    return (there > 0) & (now > _FACTOR * best) & (now > _ENOUGH * squares.sum(1)), signed


def _least(q: Quantizer, rows: Tensor, counts: Tensor | None, there: Tensor, signed: bool) -> Tensor:
    """About the least squared error of each row at the quantizer's bits, at least the noise of rounding."""
    ladder = max_scale(rows.amin(1), rows.amax(1), q.bits, signed)[:, None] * _LADDER.to(rows)
    least, at = grid_errors(rows, counts, ladder, *level_bounds(q.bits, signed)).min(1)
    return torch.maximum(least, there * ladder.gather(1, at[:, None])[:, 0].double().square() / 12)


def weight_rows(layer: QuantizedLayer, count: int) -> Tensor:
    """Values of a layer's weight, shape (rows, n): some of them, in one row or in one for each of its channels."""
    weight = full_tensor(layer.read_weight().detach()).float()
    rows = weight.reshape(1, -1) if count == 1 else weight.movedim(layer.weight_quantizer.channel_dim, 0).flatten(1)
    return rows[:, :: even_stride(rows.shape[1], _WEIGHTS)] if rows.numel() else rows


class InputSampler(Watcher):
    """The range of what activation quantizers see in a forward, and some of the values."""

    def __init__(self, quantizers: Iterable[Quantizer]) -> None:
        self.samples: dict[Quantizer, _Sample] = {quantizer: _Sample() for quantizer in quantizers}

    def on_quantized(self, quantizer: Quantizer, x: Tensor, out: Tensor | None) -> None:
        sample = self.samples.get(quantizer)
        if sample is not None and x.numel():
            with torch.no_grad():
                sample.add(x.detach().reshape(-1))


class _Sample:
    def __init__(self) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.values: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        low, high = (bound.float() for bound in x.aminmax())
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self.values.append(x[:: even_stride(len(x), _INPUTS)].float())


def sampled_inputs(sampler: InputSampler, pooled: bool = True) -> Iterator[tuple[Quantizer, Tensor, Tensor]]:
    """Values of what each activation quantizer has seen and how often, shape (1, cells) each.

    What was not finite, or nothing, is left out.

    Args:
        sampler: What it was seen by.
        pooled: Whether over all processes, in three collectives for all of them together. Processes that called other
            layers take part all the same.
    """
    samples = sampler.samples
    if not samples:
        return
    device = next(iter(samples)).state.device
    infinity = torch.tensor(math.inf, device=device)
    lows = torch.stack([infinity if s.low is None else s.low.to(device) for s in samples.values()])
    highs = torch.stack([-infinity if s.high is None else s.high.to(device) for s in samples.values()])
    # A NaN would pass through the pool differently on different backends: infinity stands for it.
    lows, highs = lows.nan_to_num(-math.inf, math.inf, -math.inf), highs.nan_to_num(math.inf, math.inf, -math.inf)
    if pooled:
        lows, highs = pool(lows, dist.ReduceOp.MIN), pool(highs, dist.ReduceOp.MAX)
    usable = (lows.isfinite() & highs.isfinite()).tolist()
    counts = torch.zeros(len(samples), _BINS, dtype=torch.int64, device=device)
    for i, sample in enumerate(samples.values()):
        for values in sample.values if usable[i] else ():
            counts[i] += histogram(values.to(device), lows[i], highs[i], _BINS)
    if pooled:
        counts = pool(counts, dist.ReduceOp.SUM)
    for i, q in enumerate(samples):
        if usable[i]:
            low = torch.where(lows[i] < -_NEGLIGIBLE * highs[i].abs(), lows[i], lows[i].clamp(min=0))
            centers = bin_centers(low, highs[i], _BINS)
            # The first cell is the lowest value: 0 is 0.
            centers[0] = low
            yield q, centers[None].to(q.state.device), counts[i][None].to(q.state.device)


def outgrown(q: Quantizer, rows: Tensor, counts: Tensor | None) -> tuple[float, float]:
    """Shares of values that lie more than half a step outside of the last level: now, and after a fresh fit."""
    step, low, high = (t.float() for t in q.grid())
    now = clipped_share(rows, counts, step, low, high)
    signed = q.signed or bool((rows < 0).any())
    bits = int(q.decided_widths().max())
    fresh = mse_scale(rows, bits, signed, counts)
    lowest, highest = (torch.tensor(float(bound), device=rows.device) for bound in level_bounds(bits, signed))
    return now, clipped_share(rows, counts, fresh, lowest, highest)


def outgrown_weight(layer: QuantizedLayer) -> tuple[float, float]:
    """:func:`outgrown` of a layer's weight."""
    quantizer = layer.weight_quantizer
    return outgrown(quantizer, weight_rows(layer, len(quantizer.grid()[0])), None)


def refit_rewritten(model: nn.Module) -> list[str]:
    """Fit ranges anew that a model's weights have left; a warning names the layers, which are returned.

    Merging an adapter does that, loading other weights, or a training that has ended at once behind a large update.
    Ranges of inputs stay as they are: where these are others now, :func:`~cpq_lightning.calibrate` finds both.
    """
    names = rewritten_weights(model)
    if names:
        RangeTracker(model).renew_weights(frozen=True)
        warnings.warn(
            f"The weights of {len(names)} layers have left the ranges that were fitted to them, which are fitted anew: "
            f"{', '.join(names)}. After merging or loading weights call calibrate(model, batches), so that ranges of "
            "inputs follow as well.",
            stacklevel=3,
        )
    return names
