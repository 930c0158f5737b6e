"""Range tracking: check, ever more rarely, whether training has outgrown a range, and fit stale ranges again (ours)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from cpq_lightning.attach.layers import QuantizedLayer, quantized_layers, quantizers
from cpq_lightning.functional.grid import level_bounds, signed_zero_point
from cpq_lightning.functional.grid_fit import NEGLIGIBLE, GridFit, fit_grid, fit_range
from cpq_lightning.functional.ranges import bin_centers, clipped_share, grid_errors, histogram, max_scale, mse_scale
from cpq_lightning.nn.observer import pool
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.nn.scale_init import WeightRows, even_stride, fit_rows
from cpq_lightning.nn.sharding import full_tensor
from cpq_lightning.nn.state import Settings
from cpq_lightning.nn.watch import Watcher

# The distance between two checks is at most this share of the steps so far.
_SPACING = 1 / 8
# A range is stale if it costs a bit: one bit less has four times the squared error.
_STALE_RATIO = 4.0
# Of few bits, four times the least error may be more than the values' power, which the error approaches as a scale gets
# too small. So a range is stale as well if the error is this share of the way from the least one to the power. At one
# bit, the scale is then off by a factor of two.
_STALE_SHARE = 1 / 4
# An error this small, relative to the values' power, is no reason to fit: a better scale for one batch may be worse for
# the next.
_ACCEPTED_ERROR = 1e-4
# Numbers of values that are checked: of a weight with one scale, of each channel or group with its own, and of an
# activation in one call; and the number of bins of an activation's histogram.
_WEIGHTS, _CHANNEL, _INPUTS, _BINS = 2**12, 2**8, 2**15, 2**12
# Share of a weight's channels that may be out of their ranges after an update.
_FEW = 0.1
_REWRITTEN = (
    "The weights of {count} layers have left the ranges that were fitted to them, which are now fitted again: {names}. "
    "After merging, loading or pruning weights call calibrate(model, batches), so that the ranges of inputs are fitted "
    "as well."
)
_PRUNED = (
    "The weights of {count} layers have zeros, as after pruning, and their balanced grid had no level 0: they now have "
    "a grid with one: {names}. At one bit this grid is {{-1, 0}}, and positive weights become 0: give such layers 2 "
    "bits or more by CPQConfig(overrides=...), or keep their weights free of exact zeros. After pruning weights call "
    "calibrate(model, batches), so that the ranges of inputs are fitted as well."
)
# Candidate scales, relative to the scale of the full range. The nearest candidate is within 12 % of the best scale, and
# its error within a few percent of the least, at a twentieth of the cost of a fit.
_CANDIDATES = torch.logspace(-5, 0, 16, base=2)


def is_due(step: int) -> bool:
    """Whether ranges are checked after this step (0 is the first); it depends on nothing else.

    Each of the first 16 steps is due, then 8 steps while the number of steps doubles: 36 times in 100 steps, 63 in
    1,000, 116 in 100,000. Ranges of random weights grow by a factor of two within less than a doubling of the steps.

    Example:
        >>> [s + 1 for s in range(40) if is_due(s)][14:]
        [15, 16, 18, 20, 22, 24, 26, 28, 30, 32, 36, 40]
    """
    if step < 0:
        return False
    done = step + 1
    # Distances are powers of two, so no check needs to know when the last one was.
    return done % 2 ** max(0, math.floor(math.log2(done * _SPACING))) == 0


class RangeTracker:
    """Fit a quantizer's range again when training has outgrown it, which happens many times from random weights.

    A range is stale if its squared error is more than four times the least error at the same bits, as if it had one bit
    less, or more than a quarter of the way from the least error to the values' power (at 1 and 2 bits). The error is
    measured on the weight after a step, or on the inputs of the step's batches. The least error counts as at least the
    rounding noise, a twelfth of the squared scale for each value, because few values can be fitted by chance. An error
    below 1e-4 of the values' power is always accepted. The starting scale of each width is fitted again; the learned
    noise scale is kept.

    ``step`` counts optimizer steps since quantization began, and is the only state between steps, so a resumed run
    checks and decides exactly like an uninterrupted one. With gradient accumulation, call :meth:`before_batch` with the
    same step for each batch, and :meth:`after_step` after the last one.

    Args:
        model: An attached model.
        optimizers: The optimizers of the quantizers' parameters; the momentum of a scale that is fitted again is
            dropped, because it belongs to the previous scale.
        inputs: Whether to check activations too; several processes must agree on them.

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
        """If ``step`` is due, sample the activations that are quantized by the next forwards in this thread."""
        if not is_due(step):
            return
        self.pause()
        if self._sampling is None:
            renewable = [q for _, q in quantizers(self.model) if _renewable(q)]
            activations = [q for q in renewable if q.kind == "activation" and self.inputs]
            balanced = [q for q in renewable if q.kind == "weight" and q.prefers_balanced_grids]
            self._sampling = InputSampler(activations, balanced)
        self._sampling.__enter__()

    def pause(self) -> None:
        """Stop sampling; the samples are used by the next :meth:`after_step`."""
        if self._sampling is not None:
            self._sampling.__exit__(None, None, None)

    def forget(self) -> None:
        """Drop all samples."""
        self.pause()
        self._sampling = None

    @torch.no_grad()
    def after_step(self, step: int) -> list[str]:
        """Check all ranges if ``step`` is due; all processes must call this together.

        Returns:
            Names of the quantizers whose range has changed.
        """
        self.pause()
        if not is_due(step):
            self._sampling = None
            return []
        renewed = self.renew_weights()
        sampled, self._sampling = self._sampling, None
        for q, rows, counts in sampled_inputs(sampled) if sampled is not None else ():
            if self._renew(q, rows, counts):
                renewed.add(q)
        return [name for name, q in quantizers(self.model) if q in renewed]

    @torch.no_grad()
    def propose(self) -> None:
        """Store new ranges in the quantizers whose sampled inputs have outgrown theirs, to apply at the next step."""
        for q, rows, counts in sampled_inputs(self._sampling) if self._sampling is not None else ():
            if _stale(q, rows, counts).any():
                q.propose(_fit(q, rows, counts))

    @torch.no_grad()
    def renew_weights(
        self, frozen: bool = False, among: Collection[Quantizer] | None = None, rewritten: bool = False
    ) -> set[Quantizer]:
        """Check only the weights, at any step; return the quantizers whose range has changed.

        A weight may be masked before each forward, and moved by the optimizer after it: where zeros of what the sampled
        forwards used mean something, that is what counts.

        Args:
            frozen: Whether to check layers that do not train as well, whose weights may have been rewritten.
            among: The quantizers to check; ``None`` means all.
            rewritten: Whether weights may have been rewritten: where no zeros mean something any more, a weight gets a
                balanced grid again.
        """
        masked = {} if self._sampling is None else self._sampling.masked
        weights = ((q, masked.get(q, weight)) for q, weight in _weights(self.model, frozen, among))
        was_balanced = {q for _, q in quantizers(self.model) if q.kind == "weight" and q.has_balanced_grids}
        renewed = {q for q, weight in weights if self._renew(q, *_sampled(q, weight), weight, rewritten)}
        if pruned := _layers_of(self.model, {q for q in renewed & was_balanced if not q.has_balanced_grids}):
            _warn(_PRUNED, pruned)
        return renewed

    def _renew(
        self, q: Quantizer, rows: Tensor, counts: Tensor | None, weight: Tensor | None = None, rewritten: bool = False
    ) -> bool:
        if not rows.numel():
            return False
        stale = _stale(q, rows, counts, weight)
        if weight is not None and (rewritten or stale.any()) and _has_another_grid(q, weight):
            # All channels share the zero points of a weight.
            stale = torch.ones_like(stale)
        if not stale.any():
            return False
        if weight is not None:
            fits = _fit_weight(q, weight, stale)
        else:
            assert counts is not None
            fits = _fit(q, rows, counts)
        if fits is None:
            return False
        q.renew(fits, stale)
        self._drop_momentum(q.log_scale, stale)
        return True

    def _drop_momentum(self, parameter: Tensor, stale: Tensor) -> None:
        for optimizer in self.optimizers:
            if parameter not in optimizer.state:
                continue
            if stale.all():
                del optimizer.state[parameter]
                continue
            # Only some channels are stale: clear their part of the state that has a value for each element.
            for value in optimizer.state[parameter].values():
                if isinstance(value, Tensor) and value.shape == stale.shape:
                    value.masked_fill_(stale, 0.0)


@torch.no_grad()
def _weights(
    model: nn.Module, frozen: bool, among: Collection[Quantizer] | None = None
) -> Iterator[tuple[Quantizer, Tensor]]:
    # A shared weight is checked once.
    for q, layer in {layer.weight_quantizer: layer for _, layer in quantized_layers(model)}.items():
        if _renewable(q, frozen) and (among is None or q in among):
            yield q, full_tensor(layer.read_weight().detach()).float()


@torch.no_grad()
def without_level_zero(model: nn.Module) -> list[str]:
    """Names of the layers whose weight has zeros that mean something, on a balanced grid, which has no level 0."""
    # Most models have no balanced grid, and their weights need not be read.
    balanced = {
        layer.weight_quantizer for _, layer in quantized_layers(model) if layer.weight_quantizer.has_balanced_grids
    }
    return _layers_of(model, {q for q, weight in _weights(model, frozen=True, among=balanced) if lacks_zero(q, weight)})


@torch.no_grad()
def rewritten_weights(model: nn.Module) -> list[str]:
    """Names of the layers whose weight has left its fitted range, by the rule of :class:`RangeTracker` for the whole
    weight.

    Where channels have a range each, a few may be out of theirs between two checks: they count if they are more than a
    tenth, and have lost half of what their grids could hold.
    """
    weights = _weights(model, frozen=True)
    return _layers_of(model, {q for q, weight in weights if weight.numel() and _is_rewritten(q, weight)})


def _is_rewritten(q: Quantizer, weight: Tensor) -> bool:
    if lacks_zero(q, weight):
        return True
    rows, counts = _sampled(q, weight)
    if q.range_rule == "max":
        return float(_stale(q, rows, counts, weight).double().mean()) > _FEW
    errors = _errors(q, rows, counts, _count_nonzero(rows, counts))
    current, least, squares = errors
    # Channels of little power add little to the sums, and matter where a norm follows.
    lost = (squares > 0) & (current > (least + squares) / 2)
    return float(lost.double().mean()) > _FEW or bool(_costs_a_bit(*(error.sum() for error in errors)))


def _costs_a_bit(current: Tensor, least: Tensor, squares: Tensor) -> Tensor:
    """Whether squared errors are those of a stale range; see :class:`RangeTracker`."""
    bound = torch.minimum(_STALE_RATIO * least, least + _STALE_SHARE * (squares - least).clamp(min=0))
    return (current > bound) & (current > _ACCEPTED_ERROR * squares)


def _renewable(q: Quantizer, frozen: bool = False) -> bool:
    """Whether a quantizer has a range, and its layer trains (or ``frozen`` layers count)."""
    return q.active and q.fitted and (frozen or q.log_scale.requires_grad)


def _fit(q: Quantizer, rows: Tensor, counts: Tensor) -> list[GridFit]:
    """A grid for each fitted width of an activation.

    A grid with negative levels keeps some, because a later batch may have negative values again, and losing them would
    cost more than a level.
    """
    settings = q.settings
    return [fit_grid(rows, counts, k, q.range_rule, settings.grid, _least(settings, k)) for k in q.fitted_widths]


def _fit_weight(q: Quantizer, weight: Tensor, where: Tensor) -> list[GridFit] | None:
    """A grid for each fitted width of a weight, with scales of the channels or groups that ``where`` names, and ones
    elsewhere; ``None`` if all these are zero.
    """
    part = q.rows_of(weight, len(where)).of(where)
    fits = fit_rows(part, q.fitted_widths, q.range_rule, q.balanced_widths(weight))
    if fits is None:
        return None
    ones = torch.ones_like(q.log_scale, dtype=torch.float32)
    return [fit._replace(scale=ones.masked_scatter(where, fit.scale.to(ones.device))) for fit in fits]


def _least(settings: Settings, bits: int) -> float:
    """The least zero point that a new grid of ``bits`` may have."""
    return 0.0 if settings.grid in ("signed", "unsigned") else min(1.0, settings.zero_point(bits))


def _stale(q: Quantizer, rows: Tensor, counts: Tensor | None, weight: Tensor | None = None) -> Tensor:
    """For each row, whether its range is stale; ``weight`` is the complete weight that rows are a sample of."""
    nonzero, scale, settings = _count_nonzero(rows, counts), q.scale(), q.settings
    bits, z = settings.bits, settings.zero_point(settings.bits)
    if weight is not None and lacks_zero(q, weight):
        return torch.ones_like(nonzero, dtype=torch.bool)
    if q.range_rule == "max":
        best = z
        if q.kind == "activation":
            best = fit_range(rows.min(), rows.max(), bits, settings.grid, _least(settings, bits)).zero_point
        full_range = max_scale(rows.amin(1), rows.amax(1), bits=bits, zero_point=best)
        # The thresholds are wide, because the highest value differs between batches.
        return (nonzero > 0) & ((full_range > 1.25 * scale) | (full_range < scale / 2))
    return (nonzero > 0) & _costs_a_bit(*_errors(q, rows, counts, nonzero))


def _errors(q: Quantizer, rows: Tensor, counts: Tensor | None, nonzero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each row its squared error, an approximation of the least one, and its sum of squares."""
    settings = q.settings
    current = grid_errors(rows, counts, q.scale()[:, None], *settings.bounds)[:, 0]
    zero_points = _other_zero_points(q, rows)
    least = torch.stack([_least_error(rows, counts, nonzero, settings.bits, z) for z in zero_points]).amin(0)
    squares = rows.double().square() if counts is None else rows.double().square() * counts
    return current, least, squares.sum(1)


def _count_nonzero(rows: Tensor, counts: Tensor | None) -> Tensor:
    nonzero = rows.ne(0).double() if counts is None else counts * rows.ne(0)
    return nonzero.sum(1, dtype=torch.float64)


def lacks_zero(q: Quantizer, weight: Tensor) -> bool:
    """Whether zeros that mean something have appeared, such as those of a pruning mask, and a grid has no level 0."""
    return q.has_balanced_grids and not q.balanced_widths(weight)


def _has_another_grid(q: Quantizer, weight: Tensor) -> bool:
    """Whether a weight would now get a grid of the other kind, balanced or signed, at some width."""
    return q.has_balanced_grids != bool(q.balanced_widths(weight))


def _other_zero_points(q: Quantizer, rows: Tensor) -> set[float]:
    """The zero point of the widest grid, and a few others that a new fit may choose."""
    settings = q.settings
    bits, z = settings.bits, settings.zero_point(settings.bits)
    if q.kind == "weight" or settings.grid in ("signed", "unsigned") or not bool((rows < 0).any()):
        return {z}
    if settings.grid == "int8":
        return {z, signed_zero_point(bits)}
    return {z, signed_zero_point(bits), fit_range(rows.min(), rows.max(), bits, "offset").zero_point}


def _least_error(rows: Tensor, counts: Tensor | None, nonzero: Tensor, bits: int, zero_point: float) -> Tensor:
    """Approximate least squared error of each row at a width, and at least the rounding noise."""
    full = max_scale(rows.amin(1), rows.amax(1), bits=bits, zero_point=zero_point)
    candidates = full[:, None] * _CANDIDATES.to(rows)
    least, index = grid_errors(rows, counts, candidates, *level_bounds(bits, zero_point)).min(1)
    return torch.maximum(least, nonzero * candidates.gather(1, index[:, None])[:, 0].double().square() / 12)


def _sampled(q: Quantizer, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """A sample of a weight in rows, one for each scale, and how often each value counts; ``None`` means once."""
    sample = _sampled_rows(q, weight, len(q.log_scale))
    return sample.values, sample.counts


def _sampled_rows(q: Quantizer, weight: Tensor, count: int) -> WeightRows:
    return q.rows_of(weight, count).sample(_WEIGHTS if count == 1 else _CHANNEL)


class InputSampler(Watcher):
    """Record the range of each activation quantizer's inputs in a forward, and a sample of their values.

    Args:
        quantizers: The quantizers of activations to sample.
        balanced: The quantizers of weights to watch for zeros, which a balanced grid does not have.
    """

    def __init__(self, quantizers: Iterable[Quantizer], balanced: Iterable[Quantizer] = ()) -> None:
        self.samples: dict[Quantizer, _Sample] = {quantizer: _Sample() for quantizer in quantizers}
        self.balanced = set(balanced)
        # Weights, as a forward used them, whose zeros mean something.
        self.masked: dict[Quantizer, Tensor] = {}

    def on_quantized(self, quantizer: Quantizer, x: Tensor, out: Tensor | None) -> None:
        if quantizer in self.balanced and not quantizer.balanced_widths(x):
            self.masked[quantizer] = full_tensor(x.detach()).float().clone()
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
    """For each activation quantizer, the sampled values and their counts, shape (1, bins) each.

    Quantizers that saw nothing, or values that are not finite, are left out.

    Args:
        sampler: The sampler that watched the forward.
        pooled: Whether to pool over all processes, in three collectives for all quantizers together. Processes whose
            forwards called other layers take part as well.
    """
    samples = sampler.samples
    if not samples:
        return
    device = next(iter(samples)).state.device
    infinity = torch.tensor(math.inf, device=device)
    lows = torch.stack([infinity if s.low is None else s.low.to(device) for s in samples.values()])
    highs = torch.stack([-infinity if s.high is None else s.high.to(device) for s in samples.values()])
    # Backends reduce NaN differently, so infinity replaces it.
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
            low = torch.where(lows[i] < -NEGLIGIBLE * highs[i].abs(), lows[i], lows[i].clamp(min=0))
            centers = bin_centers(low, highs[i], _BINS)
            # Use the lowest value for the first bin, so that 0 stays exactly 0.
            centers[0] = low
            yield q, centers[None].to(q.state.device), counts[i][None].to(q.state.device)


def outgrown(q: Quantizer, rows: Tensor, counts: Tensor | None, thorough: bool | None = None) -> tuple[float, float]:
    """Shares of values more than half a scale outside of the outermost levels: at the current scale, and refitted.

    Args:
        q: The quantizer.
        rows: Values, one row for each scale.
        counts: How often each value counts; ``None`` means once.
        thorough: How a weight is fitted, as for :func:`~cpq_lightning.functional.mse_scale`.
    """
    step, low, high = (t.float() for t in q.grid())
    current = clipped_share(rows, counts, step, low, high)
    bits = int(q.decided_widths().max())
    zero_point = q.settings.zero_point(bits)
    if q.kind == "activation" and counts is not None:
        fit = fit_grid(rows, counts, bits, q.range_rule, q.settings.grid, _least(q.settings, bits))
    else:
        scale = mse_scale(rows, bits=bits, zero_point=zero_point, counts=counts, thorough=thorough)
        fit = GridFit(scale, zero_point)
    lowest, highest = (torch.tensor(bound, device=rows.device) for bound in level_bounds(bits, fit.zero_point))
    return current, clipped_share(rows, counts, fit.scale, lowest.float(), highest.float())


def outgrown_weight(layer: QuantizedLayer) -> tuple[float, float]:
    """:func:`outgrown` for a layer's weight."""
    quantizer, weight = layer.weight_quantizer, full_tensor(layer.read_weight().detach()).float()
    sample = _sampled_rows(quantizer, weight, len(quantizer.grid()[0]))
    return outgrown(quantizer, sample.values, sample.counts, thorough=False if sample.grouped else None)


def refit_rewritten(model: nn.Module, *, only_zeros: bool = False, optimizers: Iterable[Optimizer] = ()) -> list[str]:
    """Fit ranges again that a model's weights have left; warn with the layers' names, and return them.

    Weights leave their ranges when an adapter is merged, when other weights are loaded, when they are pruned and their
    grid has no level 0, or when training ends just after a large update. Input ranges do not change; if they are stale
    too, :func:`~cpq_lightning.calibrate` fits both.

    Args:
        model: An attached model.
        only_zeros: Whether to fit only the weights that were pruned and whose grid has no level 0.
        optimizers: Those of the quantizers' parameters, if training goes on.
    """
    pruned = without_level_zero(model)
    names = pruned if only_zeros else rewritten_weights(model)
    if not names:
        return []
    stale = {layer.weight_quantizer for name, layer in quantized_layers(model) if name in names}
    RangeTracker(model, optimizers).renew_weights(frozen=True, among=stale)
    if others := [name for name in names if name not in pruned]:
        _warn(_REWRITTEN, others)
    return names


def _layers_of(model: nn.Module, weight_quantizers: Collection[Quantizer]) -> list[str]:
    return [name for name, layer in quantized_layers(model) if layer.weight_quantizer in weight_quantizers]


def _warn(reason: str, layers: Sequence[str]) -> None:
    warnings.warn(reason.format(count=len(layers), names=", ".join(layers)), stacklevel=4)
