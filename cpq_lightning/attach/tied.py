"""Tied weights: modules that have the Parameter of a quantized layer as their own, such as an embedding and the head.

Such a module reads the Parameter quantized, by the layer's own quantizer, which it has as ``weight_quantizer`` too, as
layers that share a weight do: the weight is one tensor of codes when it ships. Where it is left out by ``ignore``, or
cannot be handed the weight quantized, it reads it in full precision, and a file holds it in float32 beside the codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from cpq_lightning.attach.class_switch import switch_class, switch_class_back
from cpq_lightning.attach.layers import QuantizedLayer, quantized_layers
from cpq_lightning.attach.origin import quantizable_layers
from cpq_lightning.attach.patterns import matches
from cpq_lightning.attach.timm_layers import holds_weight
from cpq_lightning.attach.weight_readers import TiedReader
from cpq_lightning.attach.wrapping import unwrapped
from cpq_lightning.config import CPQConfig
from cpq_lightning.nn.quantizer import Quantizer

# An embedding's gradient may be one of the rows that were looked up alone; a quantizer's is of all of them.
_BEFORE = "_cpq_before_sparse"


@dataclass(frozen=True)
class Tied:
    """A module with a Parameter of its own, named within it, that a quantized layer has as its weight."""

    name: str
    module: nn.Module
    parameter: str

    @property
    def tensor(self) -> nn.Parameter:
        """The Parameter."""
        found = self.module._parameters[self.parameter]
        assert found is not None
        return found

    @property
    def reads_quantized(self) -> bool:
        """Whether its forward reads the Parameter quantized."""
        return isinstance(self.module, TiedReader) and self.module.tied_name == self.parameter


def tied_to(model: nn.Module, parameters: Mapping[int, str]) -> list[Tied]:
    """The modules that have one of some Parameters as their own, quantizable layers aside.

    Args:
        model: What is searched.
        parameters: Names of the layers that have them as their weight, by the Parameters' ``id``.
    """
    return [
        Tied(name, module, key)
        for name, module in unwrapped(model).named_modules()
        if not isinstance(module, QuantizedLayer) and not holds_weight(module)
        for key, parameter in module._parameters.items()
        if id(parameter) in parameters
    ]


def tied_to_layers(model: nn.Module) -> list[Tied]:
    """The modules that have the weight of a layer that can be quantized, or is, as their own Parameter."""
    layers = quantizable_layers(model)
    weights = {id(p): name for name, m in layers.items() if (p := m._parameters.get("weight")) is not None}
    return tied_to(model, weights)


def to_be_tied(model: nn.Module, layers: Mapping[str, nn.Module], config: CPQConfig) -> tuple[list[Tied], list[str]]:
    """What shall read the weights of layers quantized; and a warning for each module that cannot.

    Args:
        model: Before it is attached.
        layers: Those that are to be quantized, by name.
        config: Its ``ignore`` leaves modules out.

    Raises:
        ValueError: an embedding that rewrites the weight by ``max_norm``.
    """
    known = {id(p): name for name, m in layers.items() if (p := m._parameters.get("weight")) is not None}
    found: dict[str, Tied] = {}
    warnings = []
    for tied in tied_to(model, known):
        if any(matches(tied.name, tied.module, pattern) for pattern in config.ignore):
            continue
        layer = known[id(tied.tensor)]
        if getattr(tied.module, "max_norm", None) is not None:
            raise ValueError(
                f"The embedding {tied.name!r} is tied to the weight of layer {layer!r}, and with max_norm="
                f"{tied.module.max_norm:g} it rewrites rows of that in each forward, quantized ones too: leave either "
                "of them out with ignore, or max_norm off."
            )
        inside = (m for m in tied.module.modules() if m is not tied.module)
        if (
            tied.name in found
            or type(tied.module).forward is nn.Module.forward
            or any(p is tied.tensor for m in inside for p in m._parameters.values())
        ):
            own = type(tied.module).__name__
            warnings.append(
                f"The weight of layer {layer!r} is the Parameter {tied.parameter!r} of {tied.name or own!r} too, which "
                "cannot be handed it quantized: what is computed from it there stays in full precision, and an "
                "exported file holds it in float32 beside its codes. Let a module of its own, such as nn.Embedding, "
                "have it."
            )
            continue
        found[tied.name] = tied
    return list(found.values()), warnings


def tie(tied: Tied, quantizer: Quantizer) -> TiedReader:
    """Let a module read its Parameter quantized."""
    module = switch_class(tied.module, TiedReader)
    module.tied_name = tied.parameter
    module.add_module("weight_quantizer", quantizer)
    if getattr(module, "sparse", False):
        module.__dict__[_BEFORE] = True
        cast(Any, module).sparse = False
    return module


def untie(reader: TiedReader) -> None:
    """Take back :func:`tie`."""
    reader._modules.pop("weight_quantizer")
    reader.__dict__.pop("tied_name")
    if reader.__dict__.pop(_BEFORE, False):
        cast(Any, reader).sparse = True
    switch_class_back(reader)


def tied_readers(model: nn.Module) -> Iterator[tuple[str, TiedReader]]:
    """The modules of a model that read the weight of a quantized layer, with their names."""
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, TiedReader):
            yield name, module


def source_of(reader: TiedReader, model: nn.Module) -> str | None:
    """The name of the layer whose weight a module reads, quantized as the layer has it; ``None`` of none any more."""
    own = reader._parameters[reader.tied_name], reader.weight_quantizer
    for name, layer in quantized_layers(model):
        if layer._parameters.get("weight") is own[0] and layer.weight_quantizer is own[1]:
            return name
    return None


def leave_tied(model: nn.Module, written: bool = True) -> None:
    """Take back :func:`tie`, with the quantized weight ``written`` into the Parameter, where no layer has done that."""
    for _, reader in list(tied_readers(model)):
        if written and source_of(reader, model) is None:
            _write(reader)
        untie(reader)


@torch.no_grad()
def _write(reader: TiedReader) -> None:
    weight, bits = reader._parameters[reader.tied_name], reader.weight_quantizer
    assert isinstance(weight, Tensor)
    training = bits.training
    bits.eval()
    try:
        weight.copy_(bits(weight))
    finally:
        bits.train(training)
