"""The table of ``cpq doctor --model``: which implementation quantizes each layer of a model, and why."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.table import Table
from torch import Tensor, nn

from cpq_lightning.attach.layers import QuantizedLayer, quantized_layers
from cpq_lightning.attach.origin import attached_config, full_precision_layers, quantizable_layers
from cpq_lightning.attach.patterns import matches
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.report.table import LEFT_ALIGNED


def kernels_table(model: nn.Module, device: str) -> Table:
    """One row per layer of an attached model: bits and implementation of weight and input. Notes give the reasons why
    the device's kernel does not quantize one of them, or why it stays in full precision.

    Args:
        model: An attached model; it may be on the meta device.
        device: Type of the device in question, such as ``"cuda"``.
    """
    table = Table(title=f"Kernels in {'training' if model.training else 'evaluation'} on {device}", **LEFT_ALIGNED)
    table.add_column("layer", overflow="fold")
    for kind in ("weight", "input"):
        table.add_column(f"{kind}\nbits", justify="right", no_wrap=True)
        table.add_column("\nkernel", no_wrap=True)
    table.add_column("\nnotes")
    notes: dict[str, int] = {}
    # An input has a single scale, so that its shape and strides do not matter.
    any_input = torch.empty(1, device="meta")
    for name, layer in quantized_layers(model):
        operands = ("weight", layer.weight_quantizer, layer.read_weight()), ("input", layer.input_quantizer, any_input)
        cells, reasons = _cells(operands, device)
        table.add_row(name, *cells, _numbers(reasons, notes))
    for name, reason in full_precision_reasons(model).items():
        table.add_row(name, "fp32", "", "fp32", "", _numbers([reason], notes))
    table.caption = "\n".join(f"{number} {reason}" for reason, number in notes.items())
    return table


def _cells(operands: Sequence[tuple[str, Quantizer | None, Tensor]], device: str) -> tuple[list[str], list[str]]:
    cells, reasons = [], []
    for kind, quantizer, x in operands:
        if quantizer is None:
            cells += ["fp32", ""]
            reasons.append(f"{kind}: act_bits=None")
            continue
        choice = quantizer.implementation(x, device)
        narrowest = f"{quantizer.min_bits}-" if quantizer.has_gates else ""
        cells += [f"{narrowest}{quantizer.bits}", choice.implementation]
        if choice.implementation == "functional":
            kernel = "triton" if device == "cuda" else "cpu"
            reasons += [f"{kind}: {reason}" for reason in choice.reasons[kernel]]
    return cells, reasons


def _numbers(reasons: list[str], notes: dict[str, int]) -> str:
    """The numbers of the reasons among the notes; new ones are added."""
    return " ".join(str(notes.setdefault(reason, len(notes) + 1)) for reason in reasons)


def full_precision_reasons(model: nn.Module) -> dict[str, str]:
    """Why layers with a weight matrix stay in full precision, by name."""
    config = attached_config(model)
    reasons = {}
    for name, layer in quantizable_layers(model).items():
        patterns = [pattern for pattern in config.ignore if matches(name, layer, pattern)] if config else []
        if not isinstance(layer, QuantizedLayer) and patterns:
            reasons[name] = f"ignore has {', '.join(map(repr, patterns))}"
    for layer in full_precision_layers(model):
        reasons[layer.name] = "added after attach" if layer.late else f"{layer.type} has no quantized form"
    return reasons
