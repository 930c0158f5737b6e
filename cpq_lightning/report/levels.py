"""The levels of an attached model: one record per quantizer, and the file ``levels.json`` with all records."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cpq_lightning.attach.coverage import recorded_coverage
from cpq_lightning.attach.layers import QuantizedLayer, bypassed, quantized_layers, quantizers
from cpq_lightning.attach.levels_file import FORMAT
from cpq_lightning.attach.origin import full_precision_layers, late_layers, late_message
from cpq_lightning.attach.products import quantized_operands
from cpq_lightning.attach.range_tracking import outgrown_weight
from cpq_lightning.attach.wrapping import unwrapped
from cpq_lightning.bitwidth.cost import average_bits
from cpq_lightning.bitwidth.model_cost import FULL_BITS, bit_operations, float_bytes, weight_bytes
from cpq_lightning.files import write_atomically
from cpq_lightning.functional.grid import balanced_zero_point, signed_zero_point
from cpq_lightning.nn.observer import Usage
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.nn.sharding import full_tensor
from cpq_lightning.packing.size import packed_size

VERSION = 1


# Fields that only records of weights have.
_WEIGHT_FIELDS = ("kind", "group_size", "level_shares", "oscillating", "bytes", "macs", "bops")


@dataclass(frozen=True)
class LevelsRecord:
    """The settings and statistics of one quantizer in evaluation.

    Attributes:
        name: Dotted name of the layer.
        kind: ``"weight"`` or ``"activation"`` (the layer's input).
        bits: Width; a list with one width per channel where the widths are per channel.
        min_bits: Narrowest width that DropBits may drop to in training.
        signed: Whether there are negative levels.
        zero_point: Zero point of the grid, minus its lowest level: 0 for an unsigned grid, a half-integer for a
            balanced one; a list with one zero point per channel where the widths are per channel.
        scale: Distance between neighbouring levels, in the unit of the quantized values (papers call it step size); a
            list with one scale per channel where the scales are per channel; where they are per group of inputs, with
            the mean over the groups of each channel.
        low: Lowest level, as a multiple of the scale (a half-integer for a balanced grid); the minimum over the
            channels.
        high: Highest level, as a multiple of the scale; the maximum over the channels.
        numel: Elements of the weight, or of the activation in one sample; 0 before a range is known.
        used_levels: Number of levels that occur; ``None`` for an activation that was not measured.
        relative_error: ``sum (x - x_hat)^2 / sum x^2``; ``None`` for an activation that was not measured.
        clipped: Share of the values that lie more than half a scale beyond the lowest or highest level; ``None`` for an
            activation that was not measured.
        first_or_last: Whether the layer is a first or last layer, at ``first_last_bits``.
        quantizing: ``False`` while the quantizer passes its values on in full precision, and for a weight that the
            forward reads without calling its layer.
        group_size: Weights only: the inputs that share a scale; ``None`` without groups.
        level_shares: Weights only: the share of the elements at each level from ``low`` to ``high``; in steps of a half
            where only some channels have a balanced grid.
        oscillating: Weights only: the share of elements that oscillated at the end of training; ``None`` without
            :class:`~cpq_lightning.callbacks.OscillationMonitor`.
        bytes: Weights only: size of the packed codes; the size in float32 while the weight is in full precision.
        macs: Weights only: multiply-accumulates in one sample; 0 before a forward.
        bops: Weights only: bit operations, ``macs`` times the bits of the weight times the bits of the activation; a
            factor is 32 where that side is in full precision.
    """

    name: str
    kind: str
    bits: int | list[int]
    min_bits: int
    signed: bool
    zero_point: float | list[float]
    scale: float | list[float]
    low: float
    high: float
    numel: int
    used_levels: int | None
    relative_error: float | None
    clipped: float | None
    first_or_last: bool
    quantizing: bool
    group_size: int | None = None
    level_shares: list[float] | None = None
    oscillating: float | None = None
    bytes: int | None = None
    macs: int | None = None
    bops: float | None = None

    @property
    def mean_bits(self) -> float:
        """Width; the mean over the channels where widths are per channel."""
        return mean_over_channels(self.bits)

    @property
    def computed_bits(self) -> float:
        """Width of the values that the layer multiplies: 32 while they are in full precision."""
        return self.mean_bits if self.quantizing else FULL_BITS


# What grid_mark stands for, in notes of tables and plots.
GRID_MARKS = "u: unsigned, z3: zero point 3, ±: balanced, in brackets: some channels"


def grid_mark(quantizer: Mapping[str, Any]) -> str:
    """A mark for the grid of a quantizer in ``levels.json``; none for a signed one (see :data:`GRID_MARKS`)."""
    bits, zero_points = quantizer["bits"], quantizer.get("zero_point", -quantizer["low"])
    if not isinstance(zero_points, list):
        return _mark(max(bits) if isinstance(bits, list) else bits, zero_points)
    marks = sorted({_mark(width, z) for width, z in zip(bits, zero_points, strict=True)})
    return marks[0] if len(marks) == 1 else f"({' '.join(mark for mark in marks if mark)})"


def _mark(bits: int, zero_point: float) -> str:
    if zero_point == 0:
        return "u"
    if zero_point == signed_zero_point(bits):
        return ""
    return "±" if zero_point == balanced_zero_point(bits) else f"z{zero_point:g}"


def mean_over_channels(value: float | Sequence[float]) -> float:
    """The mean of a list with one value per channel; a single value unchanged."""
    return sum(value) / len(value) if isinstance(value, Sequence) else value


def levels(model: nn.Module) -> list[LevelsRecord]:
    """One record per quantizer of an attached model, in execution order: a layer's weight, then its activation.

    The operands of products without a weight follow, under separate names. After the first forward, a layer that the
    forward bypasses has no record of its input, because no quantizer sees that input.

    The used levels and the error of an activation are known after a forward under
    :func:`cpq_lightning.attach.recording`; at the end of a fit ``CPQCallback`` has recorded one validation batch. A
    warning names the layers whose weight has no quantizer although the config does not leave them out.

    Raises:
        ValueError: the model is not quantized.

    Example:
        >>> from cpq_lightning import CPQConfig, attach
        >>> model = attach(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), CPQConfig(weight_bits=3, act_bits=None))
        >>> [(r.name, r.bits, r.low, r.high) for r in levels(model)]
        [('0', 8, -128, 127), ('1', 8, -128, 127)]
    """
    model = unwrapped(model)
    records = _records(model)
    for message in full_precision_messages(model):
        warnings.warn(message, stacklevel=2)
    return records


def _records(model: nn.Module) -> list[LevelsRecord]:
    layers = dict(quantized_layers(model))
    if not layers:
        raise ValueError(f"The model {type(model).__name__} is not quantized: call attach(model, config) first.")
    records = []
    weights, unread = bypassed(model)
    for name, layer in sorted(layers.items(), key=lambda item: item[1].weight_quantizer.execution_index):
        layer.fit_if_needed()
        inputs = layer.input_quantizer
        record = _weight_record(name, layer)
        if layer in weights:
            records.append(replace(record, quantizing=False, macs=0, bops=0.0))
            continue
        if inputs is None or layer in unread:
            records.append(replace(record, bops=float((record.macs or 0) * record.computed_bits * FULL_BITS)))
            continue
        activation = _record(name, inputs, inputs.measured)
        bops = float((record.macs or 0) * record.computed_bits * activation.computed_bits)
        records += [replace(record, bops=bops), activation]
    for name, quantizer in quantized_operands(model):
        records.append(_record(name, quantizer, quantizer.measured))
    return records


def _record(
    name: str, quantizer: Quantizer, usage: Usage | None, channels: int | None = None, **more: Any
) -> LevelsRecord:
    step, low, high = quantizer.grid()
    widths, size = quantizer.decided_widths().tolist(), quantizer.settings.group_size
    scales = (step.reshape(channels, -1).mean(1) if size and channels else step).detach().tolist()
    return LevelsRecord(
        name=name,
        kind=quantizer.kind,
        bits=widths[0] if len(widths) == 1 else widths,
        min_bits=quantizer.min_bits,
        signed=bool(low.min() < 0),
        zero_point=_number(-low) if len(widths) == 1 else [_number(-each) for each in low],
        scale=scales[0] if len(scales) == 1 else scales,
        low=_number(low.min()),
        high=_number(high.max()),
        numel=quantizer.numel,
        used_levels=None if usage is None else usage.used_levels,
        relative_error=None if usage is None else usage.relative_error,
        clipped=None if usage is None else usage.clipped,
        first_or_last=quantizer.first_or_last,
        quantizing=quantizer.active,
        group_size=size or None,
        **more,
    )


@torch.no_grad()
def _weight_record(name: str, layer: QuantizedLayer) -> LevelsRecord:
    """The record of a layer's weight in evaluation."""
    quantizer, weight = layer.weight_quantizer, full_tensor(layer.read_weight().detach())
    quantized = quantizer.levels(weight)
    step, low, high = quantizer.grid()
    power = weight.double().square().sum()
    error = (weight.double() - (quantized * quantizer.along_channels(step, weight)).double()).square().sum()
    # Levels of balanced and of signed grids lie half a scale apart.
    per_scale = 1 if len((low % 1).unique()) == 1 else 2
    # A weight that has turned into NaN is on no level, and must not keep a report from being written.
    place = ((quantized - low.min()) * per_scale).nan_to_num(0.0).flatten().long()
    counts = torch.bincount(place, minlength=int((high.max() - low.min()) * per_scale) + 1)
    clipped, fresh_clipped = outgrown_weight(layer)
    usage = Usage(int((counts > 0).sum()), float(error / power) if power > 0 else 0.0, clipped, fresh_clipped)
    return _record(
        name,
        quantizer,
        usage,
        channels=len(weight),
        level_shares=[round(share, 6) for share in (counts / counts.sum()).tolist()],
        oscillating=quantizer.oscillating,
        bytes=weight_bytes(quantizer) if quantizer.active else 4 * weight.numel(),
        macs=quantizer.macs,
    )


@torch.no_grad()
def weight_codes(layer: QuantizedLayer) -> torch.Tensor:
    """The integer codes of a layer's weights in evaluation, int16, of the weight's shape: ``codes · code_scale``.

    Codes are the levels, or on a balanced grid twice the levels, which are odd.
    """
    quantizer, weight = layer.weight_quantizer, full_tensor(layer.read_weight().detach())
    factor = quantizer.along_channels(quantizer.codes_per_level(), weight)
    return (quantizer.levels(weight) * factor).to(torch.int16)


def code_scale(quantizer: Quantizer) -> torch.Tensor:
    """The scale of :func:`weight_codes`, one value, or one for each channel or group."""
    return (quantizer.grid()[0] / quantizer.codes_per_level()).detach()


def _number(value: torch.Tensor) -> float:
    number = float(value)
    return int(number) if number == int(number) else number


def manifest(
    model: nn.Module, *, network: nn.Module | None = None, architecture: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The content of ``levels.json``.

    It has the entries ``format``, ``version``, ``totals``, ``coverage`` and ``layers`` (in execution order, or in
    registration order before a forward), and two optional ones. ``products`` lists the operands of products without a
    weight, where ``attention=True`` quantizes some. ``full_precision`` lists the layers whose weight is not quantized
    although the config does not leave them out: ``late`` marks layers that were added after attach; the others are of
    kinds that nothing quantizes, such as recurrent layers.

    ``coverage`` is the result of :func:`cpq_lightning.coverage`: the share of multiply-accumulates that is quantized.
    It is ``null`` until the model has run a forward pass, which shows what it multiplies.

    The entries of ``totals``:

    - ``weight_bits_avg``: ``sum numel bits / sum numel`` over the quantized weights that the forward reads, without
      first and last layers.
    - ``weight_bits_avg_all``: the same with first and last layers.
    - ``act_bits_avg``: the same over activations without those of first and last layers, by their elements in one
      sample. An average over nothing is ``null``.
    - ``size_bytes``: size of the packed file: codes, scales in float32, everything that is not quantized in float32,
      and the header; equal to ``fp32_bytes`` before quantization begins.
    - ``fp32_bytes``: size in float32 of the exported network, as it was before attach.
    - ``bops``: bit operations of one sample, in products with a weight and in products that ``attention=True``
      quantizes; ``null`` before a forward.

    Args:
        model: An attached model.
        network: The part of the model that is exported; by default the full model.
        architecture: The architecture entry of the packed file, as in :func:`~cpq_lightning.export_model`.
    """
    model = unwrapped(model)
    records = _records(model)
    by_layer: dict[str, dict[str, Any]] = {}
    operands = {name for name, _ in quantized_operands(model)}
    products = []
    for record in records:
        values = asdict(record)
        if record.name in operands:
            products.append({key: value for key, value in values.items() if key not in _WEIGHT_FIELDS})
            continue
        entry = by_layer.setdefault(record.name, {"name": values["name"], "weight": None, "activation": None})
        entry[record.kind] = {key: value for key, value in values.items() if key not in ("name", "kind")}
    covered = recorded_coverage(model)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "totals": totals(model, records, model if network is None else unwrapped(network), architecture),
        "coverage": None if covered is None else covered.to_dict(),
        "layers": list(by_layer.values()),
    }
    plain = [asdict(layer) for layer in full_precision_layers(model)]
    more = {"products": products, "full_precision": plain}
    return content | {name: entries for name, entries in more.items() if entries}


def full_precision_messages(model: nn.Module) -> list[str]:
    """Messages on weights that are in full precision although the config does not leave them out.

    One message names the layers that were added after attach, another one the layers of kinds that nothing quantizes.
    """
    late = late_layers(model)
    others = [str(layer) for layer in full_precision_layers(model) if not layer.late]
    messages = [late_message(model, late)] if late else []
    if others:
        messages.append(
            f"The weights of {len(others)} layers that nothing quantizes are in full precision: {', '.join(others)}."
        )
    return messages


def compact_manifest(model: nn.Module) -> dict[str, Any]:
    """:func:`manifest` as exported files contain it: without ``coverage``, ``level_shares`` and the scales of channels,
    which the file has as tensors.
    """
    content = manifest(model)
    del content["coverage"]
    for layer in content["layers"]:
        layer["weight"].pop("level_shares")
        if isinstance(layer["weight"]["scale"], list):
            del layer["weight"]["scale"]
    return content


def totals(
    model: nn.Module, records: list[LevelsRecord], network: nn.Module, architecture: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The totals of :func:`manifest`."""
    bypassed_names = {name for name, layer in quantized_layers(model) if layer in bypassed(model)[0]}
    weights = [r for r in records if r.kind == "weight" and r.name not in bypassed_names and r.quantizing]
    # Before quantization begins, no packed file can be written.
    full_precision = not any(q.active for _, q in quantizers(model))
    return {
        "weight_bits_avg": average_bits((r.numel, r.mean_bits) for r in weights if not r.first_or_last),
        "weight_bits_avg_all": average_bits((r.numel, r.mean_bits) for r in weights),
        "act_bits_avg": average_bits(
            (r.numel, r.mean_bits) for r in records if r.kind == "activation" and not r.first_or_last and r.quantizing
        ),
        "size_bytes": float_bytes(network) if full_precision else packed_size(network, architecture),
        "fp32_bytes": float_bytes(network),
        "bops": _full_precision_bops(model) if full_precision else bit_operations(model),
    }


def _full_precision_bops(model: nn.Module) -> float | None:
    """Bit operations of one sample in full precision; ``None`` before a forward."""
    macs = sum(layer.weight_quantizer.macs for _, layer in quantized_layers(model))
    macs += sum(q.macs for name, q in quantized_operands(model) if name.endswith("_left"))
    return float(macs * FULL_BITS**2) if macs else None


def write_levels(model: nn.Module, path: str | Path) -> Path:
    """Write :func:`manifest` as JSON. An existing file is replaced atomically.

    Raises:
        OSError: the folder cannot be created or written to.
    """
    return write_manifest(manifest(model), path)


def write_manifest(content: dict[str, Any], path: str | Path) -> Path:
    """Write a result of :func:`manifest` as JSON. An existing file is replaced atomically."""
    path = Path(path)
    text = json.dumps(content, indent=2)
    # Each list of numbers goes on one line, so that the file is readable.
    text = re.sub(r"\[[^\[\]{}]*\]", lambda match: re.sub(r"\s+", " ", match[0]), text)
    write_atomically(path, text + "\n")
    return path


@torch.no_grad()
def clipped_shares(model: nn.Module) -> dict[str, float]:
    """The share of clipped values over all quantized weights (key ``weights``), and over all measured inputs (key
    ``inputs``).

    A key is missing where nothing of its kind is quantized yet.
    """
    weights = [
        (layer.weight_quantizer.numel, outgrown_weight(layer)[0])
        for _, layer in quantized_layers(model)
        if layer.weight_quantizer.active and layer.weight_quantizer.fitted
    ]
    inputs = [layer.input_quantizer for _, layer in quantized_layers(model)]
    measured = [(q.numel or 1, q.measured.clipped) for q in inputs if q is not None and q.active and q.measured]
    shares_by_kind = {"weights": weights, "inputs": measured}
    return {
        kind: sum(count * share for count, share in shares) / sum(count for count, _ in shares)
        for kind, shares in shares_by_kind.items()
        if shares
    }


# A clipped share above this one is reported where it is also more than twice the share that a fresh fit would clip.
_MAX_CLIPPED = 0.01


@torch.no_grad()
def range_warnings(model: nn.Module) -> list[str]:
    """Warnings about the ranges of an attached model, one message per problem, with the names of the quantizers.

    Activations are checked only after a forward under :func:`cpq_lightning.attach.recording`.
    """
    outside, single_level = [], []
    for name, layer in quantized_layers(model):
        weights = layer.weight_quantizer
        if weights.active and weights.fitted:
            clipped, fresh_clipped = outgrown_weight(layer)
            if clipped > max(_MAX_CLIPPED, 2 * fresh_clipped):
                outside.append(f"{name} (weight, {clipped:.1%})")
    activations = [(name, layer.input_quantizer) for name, layer in quantized_layers(model)]
    for name, quantizer in (*activations, *quantized_operands(model)):
        if quantizer is None or quantizer.measured is None:
            continue
        usage = quantizer.measured
        if usage.clipped > max(_MAX_CLIPPED, 2 * usage.fresh_clipped):
            outside.append(f"{name} (input, {usage.clipped:.1%})")
        if usage.used_levels == 1:
            single_level.append(name)
    messages = []
    if outside:
        messages.append(
            f"{len(outside)} quantizers clip more values than after a fresh fit of their ranges: "
            f"{', '.join(outside)}. Calibrate again, train for longer, or give CPQCallback a larger lr_factor."
        )
    if single_level:
        messages.append(
            f"All inputs of {len(single_level)} layers fall on one level, so that no information passes through them: "
            f"{', '.join(single_level)}. Calibrate again on batches like those of the evaluation, or give these layers "
            "more bits."
        )
    return messages
