"""The levels of an attached model: a record per quantizer, and the ``levels.json`` that holds them."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cpq_lightning.attach import QuantizedLayer, quantized_layers, quantizers
from cpq_lightning.functional import average_bits, packed_bytes
from cpq_lightning.nn import Quantizer

FORMAT, VERSION = "cpq-levels", 1


@dataclass(frozen=True)
class LevelsRecord:
    """What one quantizer does in evaluation.

    Attributes:
        name: Dotted name of the layer.
        kind: ``"weight"`` or ``"activation"`` (the layer's input).
        bits: Width.
        min_bits: Narrowest width that DropBits may drop to in training.
        signed: Whether there are negative levels.
        step: Distance between levels, in the unit of what is quantized; a list where each channel has its own.
        low: Lowest level, in steps.
        high: Highest level, in steps.
        numel: Elements of the weight, or of the activation in one sample; 0 before a range is known.
        used_levels: How many levels occur; ``None`` for an activation that was not measured.
        relative_error: ``sum (x - x_hat)^2 / sum x^2``; ``None`` likewise.
        exempt: Whether it is a first or last layer, at ``first_last_bits``.
        quantizing: ``False`` while values pass in full precision.
    """

    name: str
    kind: str
    bits: int
    min_bits: int
    signed: bool
    step: float | list[float]
    low: int
    high: int
    numel: int
    used_levels: int | None
    relative_error: float | None
    exempt: bool
    quantizing: bool


def levels(model: nn.Module) -> list[LevelsRecord]:
    """One record per quantizer of an attached model: each layer's weight, then its activation.

    Of activations, levels in use and the error are known after a forward under
    :func:`cpq_lightning.attach.recording`; at the end of a fit ``CPQCallback`` has recorded one validation batch.

    Raises:
        ValueError: the model is not quantized.

    Example:
        >>> from cpq_lightning import CPQConfig, attach
        >>> model = attach(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), CPQConfig(weight_bits=3, act_bits=None))
        >>> [(r.name, r.bits, r.low, r.high) for r in levels(model)]
        [('0', 8, -128, 127), ('1', 8, -128, 127)]
    """
    layers = dict(quantized_layers(model))
    if not layers:
        raise ValueError(f"The model {type(model).__name__} is not quantized: call attach(model, config) first.")
    records = []
    for name, layer in layers.items():
        layer.fit_if_needed()
        records.append(_record(name, layer.weight_quantizer, *_weight_usage(layer)))
        if layer.input_quantizer is not None:
            records.append(_record(name, layer.input_quantizer, *(layer.input_quantizer.measured or (None, None))))
    return records


def _record(name: str, quantizer: Quantizer, used: int | None, error: float | None) -> LevelsRecord:
    step = quantizer.step().detach().tolist()
    low, high = quantizer.level_bounds
    return LevelsRecord(
        name=name,
        kind=quantizer.kind,
        bits=quantizer.bits,
        min_bits=quantizer.min_bits,
        signed=quantizer.signed,
        step=step[0] if len(step) == 1 else step,
        low=low,
        high=high,
        numel=quantizer.numel,
        used_levels=used,
        relative_error=error,
        exempt=quantizer.exempt,
        quantizing=quantizer.active,
    )


@torch.no_grad()
def _weight_usage(layer: QuantizedLayer) -> tuple[int, float]:
    """Levels in use, and the relative squared error, of a weight as it evaluates."""
    quantizer, weight = layer.weight_quantizer, layer.full_precision_weight()
    codes = weight_codes(layer).float()
    step = quantizer.along_channels(quantizer.step(), weight)
    power = weight.double().square().sum()
    error = (weight.double() - (codes * step).double()).square().sum()
    return len(codes.unique()), float(error / power) if power > 0 else 0.0


@torch.no_grad()
def weight_codes(layer: QuantizedLayer) -> torch.Tensor:
    """The levels of a layer's weights in evaluation, as integers (int16) of the weight's shape."""
    quantizer, weight = layer.weight_quantizer, layer.full_precision_weight()
    step = quantizer.along_channels(quantizer.step(), weight)
    return (weight.float() / step).round().clamp(*quantizer.level_bounds).to(torch.int16)


def manifest(model: nn.Module) -> dict[str, Any]:
    """The content of ``levels.json``: format, version, totals and, in execution or registration order, the layers.

    Totals: ``weight_bits_avg`` is the average over the quantized weights that are not exempt as first or last
    layer, ``sum numel bits / sum numel``; ``weight_bits_avg_all`` is over all quantized weights; ``act_bits_avg`` over
    activations (not exempt ones), by their elements in a sample; each ``null`` of nothing. ``size_bytes`` counts packed
    codes, steps in float32, and everything that is not quantized in float32; ``fp32_bytes`` the model before it was
    attached.
    """
    records = levels(model)
    by_layer: dict[str, dict[str, Any]] = {}
    for record in records:
        values = asdict(record)
        entry = by_layer.setdefault(record.name, {"name": values["name"], "weight": None, "activation": None})
        entry[record.kind] = {key: value for key, value in values.items() if key not in ("name", "kind")}
    return {"format": FORMAT, "version": VERSION, "totals": totals(model, records), "layers": list(by_layer.values())}


def totals(model: nn.Module, records: list[LevelsRecord]) -> dict[str, Any]:
    """The totals of :func:`manifest`."""
    weights = [r for r in records if r.kind == "weight"]
    own = {id(t) for _, q in quantizers(model) for t in (*q.parameters(), *q.buffers())}
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in own}
    fp32 = 4 * sum(t.numel() for t in tensors.values() if t.is_floating_point())
    quantized = {
        id(layer.full_precision_weight()): r for (_, layer), r in zip(quantized_layers(model), weights, strict=True)
    }
    packed = sum(packed_bytes(r.numel, r.bits) for r in quantized.values())
    steps = 4 * sum(len(r.step) if isinstance(r.step, list) else 1 for r in records)
    rest = fp32 - 4 * sum(r.numel for r in quantized.values())
    return {
        "weight_bits_avg": average_bits((r.numel, r.bits) for r in weights if not r.exempt),
        "weight_bits_avg_all": average_bits((r.numel, r.bits) for r in weights),
        "act_bits_avg": average_bits((r.numel, r.bits) for r in records if r.kind == "activation" and not r.exempt),
        "size_bytes": packed + steps + rest,
        "fp32_bytes": fp32,
    }


def write_levels(model: nn.Module, path: str | Path) -> Path:
    """Write :func:`manifest` as JSON; a file that is there is replaced whole or not at all.

    Raises:
        OSError: the folder cannot be made or written.
    """
    path = Path(path)
    text = json.dumps(manifest(model), indent=2) + "\n"
    write_atomically(path, text)
    return path


def write_atomically(path: Path, text: str) -> None:
    """Write a text file by way of a temporary one beside it, so that no reader ever finds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
