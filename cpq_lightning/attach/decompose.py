"""Which modules of a model are decomposed, see :mod:`cpq_lightning.attach.decomposed`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from cpq_lightning.attach.decomposed import (
    Decomposed,
    ParameterLayer,
    Part,
    decompose_module,
    is_plain,
    own_weights,
    recompose_module,
    shapes_with_own_weights,
)
from cpq_lightning.attach.hugging_face import Conv1DByLayer
from cpq_lightning.attach.layers import QuantizedLayer
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
        parts = mixin.parts_of(module)
        if parts and is_plain(module, parts):
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


def is_layer_of(module: nn.Module, layer: str) -> bool:
    """Whether a module that is not decomposed would call a layer of this name if it were."""
    return _parts_for(module, layer) is not None


def _parts_for(module: nn.Module, layer: str) -> tuple[type[Decomposed], dict[str, Part]] | None:
    found = parts_of(module)
    return found if found is not None and (layer in found[1] or layer in found[0].other_layers) else None


def decompose_for(model: nn.Module, layers: Iterable[str]) -> list[Decomposed]:
    """Decompose the modules that the named layers belong to, where they are not; return them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    done = []
    for name in layers:
        owner, _, layer = name.rpartition(".")
        if owner in modules and (found := _parts_for(modules[owner], layer)) is not None:
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


def own_all_weights(model: nn.Module, layers: Iterable[str]) -> None:
    """Decompose the modules that the named layers belong to, and give all layers of these their own weights.

    Args:
        model: A model that is not quantized.
        layers: Names of layers; modules that are decomposed already are left alone.
    """
    for module in decompose_for(model, layers):
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
    for name in layers:
        owner, _, layer = name.rpartition(".")
        module = modules.get(owner)
        if isinstance(module, Decomposed):
            owners[owner] = parts_in(module)
        elif module is not None and (found := _parts_for(module, layer)) is not None:
            owners[owner] = found[1]
    for owner, parts in owners.items():
        prefix = f"{owner}." if owner else ""
        for key in {key for part in parts.values() for key in (part.weight, part.bias) if key is not None}:
            # Also the tensors that a parametrization or a pruning mask computes it from.
            of_key = (
                f"{prefix}{key}",
                f"{prefix}{key}_orig",
                f"{prefix}{key}_mask",
                f"{prefix}{key}_g",
                f"{prefix}{key}_v",
            )
            for name in [n for n in changed if n in of_key or n.startswith(f"{prefix}parametrizations.{key}.")]:
                del changed[name]
        changed |= shapes_with_own_weights(owner, parts, modules[owner])
    return changed
