"""Tied weights: modules that share the Parameter of a quantized layer, such as an embedding and the head.

Such a module reads the Parameter quantized, by the layer's quantizer, which is registered as its ``weight_quantizer``
too, as in layers that share a weight. An exported model then has the weight once, as one tensor of codes. If ``ignore``
leaves the module out, or if the module cannot be given the quantized weight, it reads the weight in full precision, and
an exported file has the weight in float32 as well as in codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from cpq_lightning.attach.class_switch import switch_class, switch_class_back
from cpq_lightning.attach.decomposed import ParameterLayer, holder_of, reads_itself, whole_parameter
from cpq_lightning.attach.layers import QuantizedLayer, quantized_layers, quantized_weight
from cpq_lightning.attach.origin import quantizable_layers
from cpq_lightning.attach.patterns import matches
from cpq_lightning.attach.timm_layers import holds_weight
from cpq_lightning.attach.weight_readers import TiedReader, make_dense, restore_sparse
from cpq_lightning.attach.wrapping import unwrapped
from cpq_lightning.config import CPQConfig
from cpq_lightning.nn.quantizer import Quantizer


@dataclass(frozen=True)
class Tied:
    """A module, and the name of its Parameter that is also the weight of a quantized layer."""

    name: str
    module: nn.Module
    parameter: str

    @property
    def tensor(self) -> nn.Parameter:
        """The Parameter."""
        parameter = self.module._parameters[self.parameter]
        assert parameter is not None
        return parameter

    @property
    def reads_quantized(self) -> bool:
        """Whether its forward reads the Parameter quantized."""
        return isinstance(self.module, TiedReader) and self.module.tied_name == self.parameter


def tied_to(model: nn.Module, parameters: Mapping[int, str]) -> list[Tied]:
    """The modules that have one of the given Parameters, except layers that can be quantized, and modules that multiply
    by the Parameter through the layer.

    Args:
        model: The model to search.
        parameters: Names of the layers whose weight is the Parameter, by its ``id``.
    """
    own = set()
    for layer in model.modules():
        if isinstance(layer, ParameterLayer):
            holder, key = holder_of(layer.owner, layer.part.weight)
            if not reads_itself(layer.owner, holder):
                own.add((id(holder), key))
    return [
        Tied(name, module, key)
        for name, module in unwrapped(model).named_modules()
        if not isinstance(module, QuantizedLayer) and not holds_weight(module)
        for key, parameter in module._parameters.items()
        if id(parameter) in parameters and (id(module), key) not in own
    ]


def tied_to_layers(model: nn.Module) -> list[Tied]:
    """The modules that share the weight of a layer that is, or can be, quantized."""
    layers = quantizable_layers(model)
    weights = {id(p): name for name, m in layers.items() if (p := whole_parameter(m)) is not None}
    return tied_to(model, weights)


def to_be_tied(model: nn.Module, layers: Mapping[str, nn.Module], config: CPQConfig) -> tuple[list[Tied], list[str]]:
    """Modules to read the weights of layers quantized, and a warning for each tied module that cannot.

    Args:
        model: A model that is not attached yet.
        layers: The layers to quantize, by name.
        config: Its ``ignore`` leaves modules out.

    Raises:
        ValueError: an embedding rewrites the weight by ``max_norm``, or is left out alone although the model multiplies
            by its weight without a layer.
    """
    layer_names = {id(p): name for name, m in layers.items() if (p := whole_parameter(m)) is not None}
    readable: dict[str, Tied] = {}
    warnings = []
    for tied in tied_to(model, layer_names):
        if tied.name in layers:
            # An embedding with a quantizer of its own.
            continue
        layer = layer_names[id(tied.tensor)]
        if any(matches(tied.name, tied.module, pattern) for pattern in config.ignore):
            if isinstance(layers[layer], ParameterLayer):
                raise ValueError(
                    f"ignore: {tied.name!r} alone is left out, and the weight of layer {layer!r} is its Parameter "
                    f"{tied.parameter!r}, which the model multiplies by without a layer: leave out both or neither."
                )
            continue
        if getattr(tied.module, "max_norm", None) is not None:
            raise ValueError(
                f"The embedding {tied.name!r} is tied to the weight of layer {layer!r}, and with max_norm="
                f"{tied.module.max_norm:g} it rewrites rows of that weight in each forward, also while it is "
                "quantized: leave either of them out with ignore, or disable max_norm."
            )
        inside = (m for m in tied.module.modules() if m is not tied.module)
        if (
            tied.name in readable
            or type(tied.module).forward is nn.Module.forward
            or any(p is tied.tensor for m in inside for p in m._parameters.values())
        ):
            class_name = type(tied.module).__name__
            warnings.append(
                f"The weight of layer {layer!r} is the Parameter {tied.parameter!r} of {tied.name or class_name!r} "
                "too, which cannot be given the quantized weight: what it computes from the weight stays in full "
                "precision, and an exported file has the weight in float32 as well as in codes. Put the Parameter in a "
                "separate module, such as nn.Embedding."
            )
            continue
        readable[tied.name] = tied
    return list(readable.values()), warnings


def tie(tied: Tied, quantizer: Quantizer) -> TiedReader:
    """Make a module read its Parameter quantized."""
    module = switch_class(tied.module, TiedReader)
    module.tied_name = tied.parameter
    module.add_module("weight_quantizer", quantizer)
    make_dense(module)
    return module


def untie(reader: TiedReader) -> None:
    """Undo :func:`tie`."""
    reader._modules.pop("weight_quantizer")
    reader.__dict__.pop("tied_name")
    restore_sparse(reader)
    switch_class_back(reader)


def tied_readers(model: nn.Module) -> Iterator[tuple[str, TiedReader]]:
    """The modules of a model that read the weight of a quantized layer, with their names."""
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, TiedReader):
            yield name, module


def source_of(reader: TiedReader, model: nn.Module) -> str | None:
    """The name of the layer that a module shares its weight and quantizer with; ``None`` if there is none any more."""
    weight, quantizer = reader._parameters[reader.tied_name], reader.weight_quantizer
    for name, layer in quantized_layers(model):
        if whole_parameter(cast(nn.Module, layer)) is weight and layer.weight_quantizer is quantizer:
            return name
    return None


@torch.no_grad()
def leave_tied(model: nn.Module, written: bool = True) -> None:
    """Undo :func:`tie`; ``written`` writes the quantized weight into the Parameter, unless a layer has done so."""
    for _, reader in list(tied_readers(model)):
        if written and source_of(reader, model) is None:
            weight = reader._parameters[reader.tied_name]
            assert weight is not None
            weight.copy_(quantized_weight(reader.weight_quantizer, weight))
        untie(reader)
