"""Which modules of a model are decomposed, see :mod:`cpq_lightning.attach.decomposed`."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from cpq_lightning.attach.decomposed import (
    Decomposed,
    ParameterLayer,
    Part,
    decompose_module,
    holder_of,
    is_plain,
    own_weights,
    reads_itself,
    recompose_module,
    shapes_with_own_weights,
)
from cpq_lightning.attach.hugging_face import Conv1DByLayer
from cpq_lightning.attach.layers import QuantizedLayer
from cpq_lightning.attach.parameter_products import ProductsByLayers
from cpq_lightning.attach.torch_attention import AttentionByLayers
from cpq_lightning.attach.torch_bilinear import BilinearByLayers
from cpq_lightning.attach.torch_recurrent import CellByLayers, RecurrentByLayers

_MIXINS: tuple[type[Decomposed], ...] = (
    AttentionByLayers, RecurrentByLayers, CellByLayers, BilinearByLayers, Conv1DByLayer,
)  # fmt: skip


def parts_of(module: nn.Module) -> tuple[type[Decomposed], dict[str, Part]] | None:
    """How a module is decomposed; ``None`` if it is not a module that can be, or is one that has been already."""
    if isinstance(module, Decomposed):
        return None
    for mixin in _MIXINS:
        if mixin.stock_of(type(module)) is None:
            continue
        parts = mixin.parts_of(module)
        if is_plain(module, parts):
            return mixin, parts
    return None


def decompose(model: nn.Module) -> list[Decomposed]:
    """Decompose all modules of a model that can be, in place; return them."""
    return [decompose_module(module, mixin, parts) for _, module, mixin, parts in list(decomposable(model))]


def decomposable(model: nn.Module) -> Iterator[tuple[str, nn.Module, type[Decomposed], dict[str, Part]]]:
    """The modules that :func:`decompose` would decompose, with their names and parts."""
    shared: set[int] | None = None
    for name, module in model.named_modules():
        if (found := parts_of(module)) is None:
            continue
        shared = _shared_parameters(model) if shared is None else shared
        if not any(id(module._parameters[part.weight]) in shared for part in found[1].values()):
            yield name, module, *found


def decompose_products(model: nn.Module, layers: Mapping[str, Mapping[str, Part]]) -> list[Decomposed]:
    """Give modules layers for the matrices that their forwards multiply by; return the modules.

    Args:
        model: A model that is not quantized.
        layers: The parts of the layers, by name of the module and of the layer.
    """
    return [decompose_module(model.get_submodule(name), ProductsByLayers, parts) for name, parts in layers.items()]


def drop_layers(model: nn.Module, layers: Collection[str]) -> None:
    """Undo :func:`decompose_products` for the named layers."""
    for name, module in list(decomposed_modules(model)):
        if isinstance(module, ProductsByLayers):
            kept = [layer for layer in module.owned_layers if f"{name}.{layer}".lstrip(".") not in layers]
            for layer in set(module.owned_layers) - set(kept):
                del module._modules[layer]
            module.owned_layers = tuple(kept)
            if not kept:
                recompose_module(module)


def is_layer_of(module: nn.Module, layer: str) -> bool:
    """Whether a module that is not decomposed would call a layer of this name if it were."""
    return _parts_for(module, [layer]) is not None


def _parts_for(module: nn.Module, layers: Collection[str]) -> tuple[type[Decomposed], dict[str, Part]] | None:
    """How a module is decomposed, if its layers are then among the named ones."""
    found = parts_of(module)
    if found is not None:
        return found if any(layer in found[1] or layer in found[0].other_layers for layer in layers) else None
    parts = ProductsByLayers.parts_named(module, layers)
    return (ProductsByLayers, parts) if parts and is_plain(module, parts) else None


def _by_owner(layers: Iterable[str]) -> dict[str, list[str]]:
    """The names of layers in their modules, by name of the module."""
    owners: dict[str, list[str]] = {}
    for name in layers:
        owner, _, layer = name.rpartition(".")
        owners.setdefault(owner, []).append(layer)
    return owners


def decompose_for(model: nn.Module, layers: Iterable[str]) -> list[Decomposed]:
    """Decompose the modules that the named layers belong to, where they are not; return them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    done = []
    for owner, names in _by_owner(layers).items():
        if owner in modules and (found := _parts_for(modules[owner], names)) is not None:
            done.append(decompose_module(modules[owner], *found))
    return done


def _shared_parameters(model: nn.Module) -> set[int]:
    """Parameters that have several names: their rows would have several quantizers."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def recompose(model: nn.Module, unused: bool = False) -> None:
    """Undo :func:`decompose`; with ``unused``, only for modules without a quantized layer."""
    for _, module in list(decomposed_modules(model)):
        names = (*module.owned_layers, *type(module).other_layers)
        if not unused or not any(isinstance(module.get_submodule(name), QuantizedLayer) for name in names):
            recompose_module(module)


def decomposed_modules(model: nn.Module) -> Iterator[tuple[str, Decomposed]]:
    """The decomposed modules of a model with their names, in registration order."""
    for name, module in model.named_modules():
        if isinstance(module, Decomposed):
            yield name, module


def parts_in(module: Decomposed) -> dict[str, Part]:
    """The parts that the layers of a decomposed module are of."""
    layers = {name: module._modules[name] for name in module.owned_layers}
    return {name: layer.part for name, layer in layers.items() if isinstance(layer, ParameterLayer)}


def own_all_weights(model: nn.Module, layers: Iterable[str], matrices: bool = True) -> None:
    """Decompose the modules that the named layers belong to, and give all layers of these their own weights.

    Args:
        model: A model that is not quantized.
        layers: Names of layers; modules that are decomposed already are left alone.
        matrices: Whether layers for matrices that a forward multiplies by get their own weights too; else these stay
            Parameters of their modules, which a forward may reach in many ways.
    """
    for module in decompose_for(model, layers):
        if matrices or not isinstance(module, ProductsByLayers):
            own_weights(module)


def with_own_weights(model: nn.Module, shapes: Mapping[str, Any], layers: Iterable[str]) -> dict[str, Any]:
    """The shapes in a model's state after :func:`own_all_weights`.

    Args:
        model: A model, attached or not.
        shapes: The shapes in its state, by name.
        layers: Names of quantized layers.
    """
    changed, modules = dict(shapes), dict(model.named_modules(remove_duplicate=False))
    owners: dict[str, dict[str, Part]] = {}
    for owner, names in _by_owner(layers).items():
        module = modules.get(owner)
        if isinstance(module, Decomposed):
            owners[owner] = parts_in(module)
        elif module is not None and (found := _parts_for(module, names)) is not None:
            owners[owner] = found[1]
    for owner, parts in owners.items():
        prefixes = [f"{name}." if name else "" for name, module in modules.items() if module is modules[owner]]
        keys = {key for part in parts.values() for key in (part.weight, part.bias) if key is not None}
        # What an embedding inside of it has too is tied to the layer.
        keys = {key for key in keys if not reads_itself(modules[owner], holder_of(modules[owner], key)[0])}
        for prefix, key in itertools.product(prefixes, keys):
            # Also the tensors that a parametrization or a pruning mask computes it from.
            of_key = {f"{prefix}{key}{ending}" for ending in ("", "_orig", "_mask", "_g", "_v")}
            for name in [n for n in changed if n in of_key or n.startswith(f"{prefix}parametrizations.{key}.")]:
                del changed[name]
        changed |= shapes_with_own_weights(owner, parts, modules[owner])
    return changed
