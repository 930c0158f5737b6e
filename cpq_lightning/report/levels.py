"""The levels of an attached model: a record per quantizer, and the ``levels.json`` that holds them."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cpq_lightning.attach.coverage import coverage, coverage_once_active
from cpq_lightning.attach.layers import QuantizedLayer, bypassed, quantized_layers, quantizers
from cpq_lightning.attach.levels_file import FORMAT
from cpq_lightning.attach.origin import full_precision_layers, late_layers, late_message
from cpq_lightning.attach.products import quantized_operands
from cpq_lightning.attach.range_tracking import outgrown_weight
from cpq_lightning.attach.wrapping import unwrapped
from cpq_lightning.bitwidth.cost import average_bits
from cpq_lightning.bitwidth.model_cost import FULL_BITS, bit_operations, float_bytes, weight_bytes
from cpq_lightning.files import write_atomically
from cpq_lightning.nn.observer import Usage
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.nn.sharding import full_tensor
from cpq_lightning.packing.size import packed_size

VERSION = 1


# What a record of an activation has no value for.
_OF_WEIGHTS = ("kind", "level_shares", "bytes", "macs", "bops")


@dataclass(frozen=True)
class LevelsRecord:
    """What one quantizer does in evaluation.

    Attributes:
        name: Dotted name of the layer.
        kind: ``"weight"`` or ``"activation"`` (the layer's input).
        bits: Width; a list where each channel has its own.
        min_bits: Narrowest width that DropBits may drop to in training.
        signed: Whether there are negative levels.
        scale: Distance between neighbouring levels, in the unit of what is quantized (papers call it step size); a list
            where each channel has its own.
        low: Lowest level, as a multiple of the scale; of the widest channel.
        high: Highest level, likewise.
        numel: Elements of the weight, or of the activation in one sample; 0 before a range is known.
        used_levels: How many levels occur; ``None`` for an activation that was not measured.
        relative_error: ``sum (x - x_hat)^2 / sum x^2``; ``None`` likewise.
        clipped: Share of values more than half a step outside of the last level; ``None`` likewise.
        exempt: Whether it is a first or last layer, at ``first_last_bits``.
        quantizing: ``False`` while values pass in full precision, and of a weight that the forward reads without its
            layer.
        level_shares: Of a weight, the share of its elements at each level from ``low`` to ``high``.
        bytes: Of a weight, its packed codes; in float32 while it passes in full precision.
        macs: Of a weight, multiply-accumulates in one sample; 0 before a forward.
        bops: Of a weight, bit operations: ``macs`` times its bits times those of the activation, each 32 where it is in
            full precision.
    """

    name: str
    kind: str
    bits: int | list[int]
    min_bits: int
    signed: bool
    scale: float | list[float]
    low: int
    high: int
    numel: int
    used_levels: int | None
    relative_error: float | None
    clipped: float | None
    first_or_last: bool
    quantizing: bool
    level_shares: list[float] | None = None
    bytes: int | None = None
    macs: int | None = None
    bops: float | None = None

    @property
    def mean_bits(self) -> float:
        """Width, the mean over channels that have their own."""
        return sum(self.bits) / len(self.bits) if isinstance(self.bits, list) else self.bits

    @property
    def computed_bits(self) -> float:
        """Width of what is multiplied: 32 while values pass in full precision."""
        return self.mean_bits if self.quantizing else FULL_BITS


def levels(model: nn.Module) -> list[LevelsRecord]:
    """One record per quantizer of an attached model: each layer's weight, then its activation; then the operands of
    products without a weight, under names of their own. Once a forward has been seen, an input that no quantizer meets
    since the forward goes round its layer has no record.

    Of activations, levels in use and the error are known after a forward under
    :func:`cpq_lightning.attach.recording`; at the end of a fit ``CPQCallback`` has recorded one validation batch. A
    warning names layers with a weight that has no quantizer, and that were not left out by the config.

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


def _record(name: str, quantizer: Quantizer, usage: Usage | None, **more: Any) -> LevelsRecord:
    step, low, high = quantizer.grid()
    widths, scales = quantizer.decided_widths().tolist(), step.detach().tolist()
    return LevelsRecord(
        name=name,
        kind=quantizer.kind,
        bits=widths[0] if len(widths) == 1 else widths,
        min_bits=quantizer.min_bits,
        signed=quantizer.signed,
        scale=scales[0] if len(scales) == 1 else scales,
        low=int(low.min()),
        high=int(high.max()),
        numel=quantizer.numel,
        used_levels=None if usage is None else usage.used_levels,
        relative_error=None if usage is None else usage.relative_error,
        clipped=None if usage is None else usage.clipped,
        first_or_last=quantizer.first_or_last,
        quantizing=quantizer.active,
        **more,
    )


@torch.no_grad()
def _weight_record(name: str, layer: QuantizedLayer) -> LevelsRecord:
    """Levels in use, their shares, and the relative squared error, of a weight as it evaluates."""
    quantizer, weight = layer.weight_quantizer, full_tensor(layer.read_weight().detach())
    codes = _codes(quantizer, weight)
    step, low, high = quantizer.grid()
    power = weight.double().square().sum()
    error = (weight.double() - (codes.float() * quantizer.along_channels(step, weight)).double()).square().sum()
    bottom = int(low.min())
    counts = torch.bincount(codes.flatten().long() - bottom, minlength=int(high.max()) - bottom + 1)
    now, fresh = outgrown_weight(layer)
    usage = Usage(int((counts > 0).sum()), float(error / power) if power > 0 else 0.0, now, fresh)
    return _record(
        name,
        quantizer,
        usage,
        level_shares=[round(share, 6) for share in (counts / counts.sum()).tolist()],
        bytes=weight_bytes(quantizer) if quantizer.active else 4 * weight.numel(),
        macs=quantizer.macs,
    )


@torch.no_grad()
def weight_codes(layer: QuantizedLayer) -> torch.Tensor:
    """The levels of a layer's weights in evaluation, as integers (int16) of the weight's shape."""
    return _codes(layer.weight_quantizer, full_tensor(layer.read_weight().detach()))


def _codes(quantizer: Quantizer, weight: torch.Tensor) -> torch.Tensor:
    return quantizer.codes(weight).to(torch.int16)


def manifest(
    model: nn.Module, *, network: nn.Module | None = None, architecture: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The content of ``levels.json``: format, version, totals and, in execution or registration order, the layers;
    under ``products``, where ``attention=True`` quantizes some, the operands of products without a weight; under
    ``full_precision``, where there are some, the layers with a weight that is not quantized and that the config does
    not leave out, ``late`` those that came behind attach (the others are such as recurrent ones).

    ``coverage`` is that of :func:`cpq_lightning.coverage`, ``null`` before a forward. Totals: ``weight_bits_avg`` is
    the average over the quantized weights that the forward reads and that are not exempt as first or last layer, ``sum
    numel bits / sum numel``; ``weight_bits_avg_all`` is over all that it reads; ``act_bits_avg`` over activations (not
    exempt ones), by their elements in a sample; each ``null`` of nothing. ``size_bytes`` is the size of the packed
    file: codes, steps in float32, everything that is not quantized in float32, and the header, or ``fp32_bytes`` before
    quantization begins; ``fp32_bytes`` what ships, before it was attached; ``bops`` bit operations of one sample, in
    products with a weight and in those that ``attention=True`` quantizes, ``null`` before a forward.

    Args:
        model: An attached model.
        network: The part of it that ships; the whole where there is none.
        architecture: As the packed file has it.
    """
    model = unwrapped(model)
    records = _records(model)
    by_layer: dict[str, dict[str, Any]] = {}
    operands = {name for name, _ in quantized_operands(model)}
    products = []
    for record in records:
        values = asdict(record)
        if record.name in operands:
            products.append({key: value for key, value in values.items() if key not in _OF_WEIGHTS})
            continue
        entry = by_layer.setdefault(record.name, {"name": values["name"], "weight": None, "activation": None})
        entry[record.kind] = {key: value for key, value in values.items() if key not in ("name", "kind")}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "totals": totals(model, records, model if network is None else unwrapped(network), architecture),
        "coverage": _coverage(model),
        "layers": list(by_layer.values()),
    }
    plain = [asdict(layer) for layer in full_precision_layers(model)]
    more = {"products": products, "full_precision": plain}
    return content | {name: found for name, found in more.items() if found}


def full_precision_messages(model: nn.Module) -> list[str]:
    """What of an attached model is in full precision, and nobody asked for: a sentence for what came behind attach, and
    one for layers that nothing quantizes.
    """
    late = late_layers(model)
    others = [str(layer) for layer in full_precision_layers(model) if not layer.late]
    found = [late_message(model, late)] if late else []
    if others:
        found.append(
            f"The weights of {len(others)} layers that nothing quantizes are in full precision: {', '.join(others)}."
        )
    return found


def compact_manifest(model: nn.Module) -> dict[str, Any]:
    """:func:`manifest` without the shares of levels, as artefacts carry it."""
    content = manifest(model)
    del content["coverage"]
    for layer in content["layers"]:
        layer["weight"].pop("level_shares")
    return content


def _coverage(model: nn.Module) -> dict[str, Any] | None:
    return None if coverage_once_active(model) is None else coverage(model).to_dict()


def totals(
    model: nn.Module, records: list[LevelsRecord], network: nn.Module, architecture: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The totals of :func:`manifest`."""
    around = {name for name, layer in quantized_layers(model) if layer in bypassed(model)[0]}
    read = [r for r in records if r.kind == "weight" and r.name not in around and r.quantizing]
    # Before quantization begins there is no packed file to be made.
    full = not any(q.active for _, q in quantizers(model))
    return {
        "weight_bits_avg": average_bits((r.numel, r.mean_bits) for r in read if not r.first_or_last),
        "weight_bits_avg_all": average_bits((r.numel, r.mean_bits) for r in read),
        "act_bits_avg": average_bits(
            (r.numel, r.mean_bits) for r in records if r.kind == "activation" and not r.first_or_last and r.quantizing
        ),
        "size_bytes": float_bytes(network) if full else packed_size(network, architecture),
        "fp32_bytes": float_bytes(network),
        "bops": _full_operations(model) if full else bit_operations(model),
    }


def _full_operations(model: nn.Module) -> float | None:
    """Bit operations of one sample in full precision; ``None`` before a forward."""
    macs = sum(layer.weight_quantizer.macs for _, layer in quantized_layers(model))
    macs += sum(q.macs for name, q in quantized_operands(model) if name.endswith("_left"))
    return float(macs * FULL_BITS**2) if macs else None


def write_levels(model: nn.Module, path: str | Path) -> Path:
    """Write :func:`manifest` as JSON; a file that is there is replaced whole or not at all.

    Raises:
        OSError: the folder cannot be made or written.
    """
    return write_manifest(manifest(model), path)


def write_manifest(content: dict[str, Any], path: str | Path) -> Path:
    """Write what :func:`manifest` has returned, likewise."""
    path = Path(path)
    text = json.dumps(content, indent=2)
    # Lists of numbers on one line each: a person reads this file too.
    text = re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text)
    write_atomically(path, text + "\n")
    return path


@torch.no_grad()
def clipped_shares(model: nn.Module) -> dict[str, float]:
    """The share of values outside of the last level, of all quantized ``weights`` and of the ``inputs`` that were
    measured; nothing of what is not quantized yet.
    """
    weights = [
        (layer.weight_quantizer.numel, outgrown_weight(layer)[0])
        for _, layer in quantized_layers(model)
        if layer.weight_quantizer.active and layer.weight_quantizer.fitted
    ]
    inputs = [layer.input_quantizer for _, layer in quantized_layers(model)]
    measured = [(q.numel or 1, q.measured.clipped) for q in inputs if q is not None and q.active and q.measured]
    found = {"weights": weights, "inputs": measured}
    return {
        kind: sum(count * share for count, share in shares) / sum(count for count, _ in shares)
        for kind, shares in found.items()
        if shares
    }


# A share clipped from which on it is told, where it is also twice what a fresh fit would clip.
_CLIPPED = 0.01


@torch.no_grad()
def range_warnings(model: nn.Module) -> list[str]:
    """What is wrong with the ranges of an attached model, a sentence a finding, with the quantizers' names.

    Of activations it is known after a forward under :func:`cpq_lightning.attach.recording`.
    """
    outside, single = [], []
    for name, layer in quantized_layers(model):
        weights = layer.weight_quantizer
        if weights.active and weights.fitted:
            now, fresh = outgrown_weight(layer)
            if now > max(_CLIPPED, 2 * fresh):
                outside.append(f"{name} (weight, {now:.1%})")
    activations = [(name, layer.input_quantizer) for name, layer in quantized_layers(model)]
    for name, quantizer in (*activations, *quantized_operands(model)):
        if quantizer is None or quantizer.measured is None:
            continue
        usage = quantizer.measured
        if usage.clipped > max(_CLIPPED, 2 * usage.fresh_clipped):
            outside.append(f"{name} (input, {usage.clipped:.1%})")
        if usage.used_levels == 1:
            single.append(name)
    found = []
    if outside:
        found.append(
            f"Of {len(outside)} quantizers more values lie outside of the grid than after a fresh fit: "
            f"{', '.join(outside)}. Calibrate again, train for longer, or give CPQCallback a larger lr_factor."
        )
    if single:
        found.append(
            f"All inputs of {len(single)} layers fall on one level, so that nothing passes through them: "
            f"{', '.join(single)}. Calibrate again on batches like those that are evaluated, or give them more bits."
        )
    return found
