"""Average bits and bit operations of an attached model. Bytes of a file: :mod:`cpq_lightning.packing.size`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from cpq_lightning.attach.decomposed import ParameterLayer
from cpq_lightning.attach.layers import QuantizedLayer, bypassed, quantized_layers, quantizers
from cpq_lightning.attach.parametrized import computing
from cpq_lightning.attach.products import STATE, modules_with_products, quantized_operands
from cpq_lightning.attach.timm_layers import shared_weight
from cpq_lightning.attach.wrapping import unwrapped
from cpq_lightning.bitwidth.cost import WidthCost, average_bits
from cpq_lightning.functional.packing import packed_bytes
from cpq_lightning.nn.quantizer import Quantizer

CostUnit = Literal["weight_bits", "act_bits", "bops"]
# Width of tensors that are not quantized: float32.
FULL_BITS = 32


def learning_quantizers(model: nn.Module) -> list[tuple[str, Quantizer]]:
    """The quantizers that learn their width, with their names, in registration order."""
    return [(name, q) for name, q in quantizers(model) if q.learns_bits]


def float_bytes(model: nn.Module) -> int:
    """Bytes in float32 of the model without quantizers; a tensor that several modules share counts once."""
    model = unwrapped(model)
    omitted = {id(t) for _, q in quantizers(model) for t in (*q.parameters(), *q.buffers())}
    omitted |= {id(module._buffers.get(STATE)) for _, module in modules_with_products(model)}
    layers = [layer for _, layer in quantized_layers(model) if not isinstance(layer, ParameterLayer)]
    weights = {id(shared_weight(layer)): layer for layer in layers}
    # An exported weight replaces the tensors that it is computed from.
    omitted |= {
        id(t) for layer in weights.values() for t in (layer._parameters.get("weight"), *computing(layer).values())
    }
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in omitted}
    rest = 4 * sum(t.numel() for t in tensors.values() if t.is_floating_point())
    return rest + 4 * sum(layer.weight.numel() for layer in weights.values())


def idle_quantizers(model: nn.Module) -> set[Quantizer]:
    """Quantizers that no forward uses, because it bypasses their layers: they neither cost nor save anything."""
    weights, inputs = bypassed(model)
    read = {layer.weight_quantizer for _, layer in quantized_layers(model) if layer not in weights}
    idle = {layer.weight_quantizer for layer in weights} - read
    return idle | {q for layer in inputs if (q := layer.input_quantizer) is not None}


def weight_bytes(quantizer: Quantizer) -> int:
    """Bytes of a weight's codes, packed without gaps at the width of the weight or of each channel."""
    widths = quantizer.decided_widths()
    return packed_bytes(quantizer.numel // len(widths) * int(widths.sum()), 1)


def mean_width(model: nn.Module, kind: str, expected: bool = False) -> float | None:
    """Average bits over the elements of all weights or activations outside of first and last layers; ``None`` without
    any.
    """
    idle = idle_quantizers(model)
    counted = [q for _, q in quantizers(model) if q.kind == kind and not q.first_or_last and q not in idle]
    widths = [(q.expected_widths() if expected else q.decided_widths()).double().mean() for q in counted]
    return average_bits((q.numel, float(width)) for q, width in zip(counted, widths, strict=True))


def bit_operations(model: nn.Module) -> float | None:
    """Bit operations of one sample, as counted by :func:`width_cost`; ``None`` before the first forward."""
    try:
        return width_cost(model, [], "bops").constant
    except ValueError:
        return None


def model_costs(model: nn.Module) -> dict[str, float]:
    """The present costs of the model by name: decided and expected average bits, and bit operations."""
    values: dict[str, float | None] = {"weight_bits": mean_width(model, "weight")}
    learned = {q.kind for _, q in quantizers(model) if q.gates.learned}
    if "weight" in learned:
        values["expected_weight_bits"] = mean_width(model, "weight", expected=True)
    values["act_bits"] = mean_width(model, "activation")
    if "activation" in learned:
        values["expected_act_bits"] = mean_width(model, "activation", expected=True)
    values["bops"] = bit_operations(model)
    return {name: float(value) for name, value in values.items() if value is not None}


def widths_by_name(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Expected and decided width of each quantizer, means over its channels, by name."""
    return {
        name: (float(q.expected_widths().mean()), float(q.decided_widths().double().mean()))
        for name, q in quantizers(model)
    }


def width_cost(model: nn.Module, learners: Sequence[Quantizer], unit: CostUnit) -> WidthCost:
    """The cost of the learners' widths; all other widths are constants.

    ``weight_bits`` and ``act_bits`` are the averages that ``levels.json`` calls ``weight_bits_avg`` and
    ``act_bits_avg``, and ``bops`` is its ``bops``: the sum over quantized layers of the multiply-accumulates of one
    sample, times the width of the weight, times that of the activation (32 in full precision), plus the sum over
    products of two quantized activations of their multiply-accumulates times both widths. For bytes see
    :func:`cpq_lightning.packing.size.byte_cost`.

    Args:
        model: An attached model.
        learners: The quantizers whose widths vary; a row is the width of a quantizer or of one of its channels, in
            order.
        unit: The cost to count.

    Raises:
        ValueError: ``bops`` before a forward has counted the multiply-accumulates of each layer.
    """
    *starts, rows = itertools.accumulate((q.gates.rows for q in learners), initial=0)
    first = dict(zip(learners, starts, strict=True))
    terms: list[tuple[Tensor, Tensor, float | Tensor]] = []
    constant = 0.0

    def add(weight: Quantizer, scale: float, other: Quantizer | None = None) -> None:
        """Add ``scale`` times the mean width of a quantizer, times that of another one."""
        nonlocal constant
        sides = [_rows(q, first, rows) for q in (weight, other)]
        (left, left_share), (right, right_share) = sides
        if left is None and right is None:
            constant += scale * left_share * right_share
            return
        one = torch.tensor([rows])
        terms.append((one if left is None else left, one if right is None else right, scale * left_share * right_share))

    if unit == "bops":
        _add_bops(model, add)
    else:
        kind = "activation" if unit == "act_bits" else "weight"
        idle = idle_quantizers(model)
        counted = [q for _, q in quantizers(model) if q.kind == kind and not q.first_or_last and q not in idle]
        total = float(sum(q.numel for q in counted)) or 1.0
        for quantizer in counted:
            add(quantizer, quantizer.numel / total)
    pairs = [torch.broadcast_tensors(left, right, torch.as_tensor(c, dtype=torch.float64)) for left, right, c in terms]
    joined = [torch.cat([p[i] for p in pairs]) if pairs else torch.zeros(0) for i in range(3)]
    return WidthCost(joined[2].double(), joined[0].long(), joined[1].long(), constant)


def _rows(quantizer: Quantizer | None, first: dict[Quantizer, int], one: int) -> tuple[Tensor | None, float]:
    """The rows of a learner and the share of each in its mean width; ``None`` and the mean width of any other."""
    if quantizer is None:
        return None, 1.0
    if quantizer not in first:
        return None, float(quantizer.decided_widths().double().mean())
    return first[quantizer] + torch.arange(quantizer.gates.rows), 1 / quantizer.gates.rows


def _add_bops(model: nn.Module, add: Callable[..., None]) -> None:
    layers: list[QuantizedLayer] = [layer for _, layer in quantized_layers(model)]
    if not any(layer.weight_quantizer.macs for layer in layers):
        raise ValueError(
            "Bit operations are not known before the first forward: run one batch through the model, or calibrate it."
        )
    idle = idle_quantizers(model)
    users: dict[Quantizer, int] = {}
    for layer in layers:
        users[layer.weight_quantizer] = users.get(layer.weight_quantizer, 0) + 1
    for layer in layers:
        # The count of a shared weight is the sum over its layers, and is divided evenly among them.
        macs = layer.weight_quantizer.macs / users[layer.weight_quantizer]
        if layer.input_quantizer is None or layer.input_quantizer in idle:
            add(layer.weight_quantizer, macs * FULL_BITS)
        else:
            add(layer.weight_quantizer, macs, layer.input_quantizer)
    operands = dict(quantized_operands(model))
    for name, left in operands.items():
        if name.endswith("_left"):
            add(left, left.macs, operands[f"{name.removesuffix('_left')}_right"])
