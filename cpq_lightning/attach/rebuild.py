"""Attach quantizers again from a ``state_dict``, with the same layers, grids and widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from cpq_lightning.attach.attach import arrange, undo_attach, unwatch, watch
from cpq_lightning.attach.decompose import decomposable, decompose_for, is_layer_of, recompose
from cpq_lightning.attach.layers import QuantizedLayer, is_attached, quantized_layers, quantizers, switch, switch_back
from cpq_lightning.attach.origin import Origin, quantizable_layers, set_origin
from cpq_lightning.attach.products import (
    STATE,
    QuantizedProducts,
    leave_products,
    operand_names,
    plan_of,
    quantize_products,
    remember_plan,
)
from cpq_lightning.attach.tied import Tied, tie, tied_readers, tied_to_layers, untie
from cpq_lightning.attach.timm_layers import holds_weight, looks_up, shared_weight, weight_parameters
from cpq_lightning.attach.weight_readers import TiedReader
from cpq_lightning.attach.wrapping import check_unspread, unwrapped
from cpq_lightning.errors import StateDictError
from cpq_lightning.functional.groups import group_count
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.nn.state import layout_differences, read

_PARTS = ("weight_quantizer", "input_quantizer")
_MARK = "weight_quantizer.state"


def quantized_in(state: Mapping[str, Any]) -> list[str]:
    """Names of the layers whose quantizers a ``state_dict`` has, and of modules that are tied to their weights."""
    return [key[: -len(_MARK)].rstrip(".") for key in state if key == _MARK or key.endswith(f".{_MARK}")]


def plain_in(model: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """Names of the layers, and of the modules that multiply, which are quantized in a state but not in a model.

    Modules that the model lacks are left out, because loading the state reports them.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    names = []
    for name in quantized_in(state):
        module = modules.get(name)
        if module is None:
            owner = modules.get(name.rpartition(".")[0])
            if owner is not None and is_layer_of(owner, name.rpartition(".")[2]):
                names.append(name)
            continue
        parts = [part for part in _PARTS if _path(name, f"{part}.state") in state]
        if isinstance(module, TiedReader):
            continue
        if not isinstance(module, QuantizedLayer) or any(getattr(module, part) is None for part in parts):
            names.append(name)
    for name in _multiplying_modules_in(state):
        if name in modules and not isinstance(modules[name], QuantizedProducts):
            names.append(name)
    return names


def check_same_quantizers(model: nn.Module, state: Mapping[str, Any], strict: bool = True, settings: str = "") -> None:
    """Refuse a state whose quantizers have other tensors than those of the model that it is loaded into.

    Args:
        model: An attached model, or a part of one.
        state: Its ``state_dict``.
        strict: Whether the state must have all quantizers of the model.
        settings: A sentence about how the settings of both differ, if known.

    Raises:
        RuntimeError: names the settings in which they differ.
    """
    missing, other, what = [], [], ""
    for name, quantizer in quantizers(model):
        given = state.get(_path(name, "state"))
        if given is None:
            missing.append(name)
        elif isinstance(given, Tensor) and not given.is_meta:
            ours, theirs = quantizer.settings, read(given)[0]
            different = layout_differences(theirs, ours)
            what = what or "; ".join(
                f"{key} {a!r} in the state_dict, {b!r} in the model" for key, (a, b) in different.items()
            )
            other += [name] * bool(different)
    advice = (
        f"{settings}Attach the model with the settings that the state was trained with (a Lightning checkpoint holds "
        "them under 'cpq_lightning'), or build it without quantizers and load within `with cpq_lightning.loading():`."
    )
    model_name = type(model).__name__
    if other:
        raise StateDictError(
            f"The quantizers of the state_dict differ from {len(other)} of {model_name}'s, such as {other[0]!r}: "
            f"{what}. {advice}"
        )
    if strict and missing:
        raise StateDictError(
            f"The state_dict has nothing of {len(missing)} quantizers of {model_name}, such as {missing[0]!r}: their "
            f"weights or inputs were in full precision. {advice}"
        )


def attach_state(model: nn.Module, state: Mapping[str, Any]) -> Callable[[], None]:
    """Attach the quantizers that a ``state_dict`` has and a model lacks; the caller loads the state afterwards.

    Layers, and modules tied to them, share one quantizer if they share a Parameter and have equal quantizers. If
    attaching fails, the model is left unchanged.

    Args:
        model: A model, or a part of one, with the layers of the state.
        state: Its ``state_dict``, with the model's names.

    Returns:
        A function that undoes the changes.

    Raises:
        ValueError: a quantizer does not fit its layer, its state cannot be read, or the model is inside a
            DistributedDataParallel of several processes.
    """
    names = plain_in(model, state)
    # Names are those of the state, which include the names of wrappers; hooks are registered on the unwrapped model.
    check_unspread(model)
    inner = unwrapped(model)
    was_attached = is_attached(model)
    shared: dict[int, list[tuple[dict[str, Tensor], Quantizer]]] = {}
    holders = [(n, shared_weight(layer), layer.weight_quantizer) for n, layer in quantized_layers(model)]
    holders += [(n, r._parameters[r.tied_name], r.weight_quantizer) for n, r in tied_readers(model)]
    for name, owner, quantizer in holders:
        if name not in names:
            shared.setdefault(id(owner), []).append((quantizer.state_dict(), quantizer))
    without_inputs: list[tuple[QuantizedLayer, Any]] = []
    layers: list[QuantizedLayer] = []
    readers: list[TiedReader] = []
    multiplying: list[QuantizedProducts] = []

    def undo() -> None:
        for reader in readers:
            untie(reader)
        for layer in layers:
            switch_back(layer, written=False)
        for layer, inputs in without_inputs:
            layer.input_quantizer = inputs
        for module in multiplying:
            leave_products(module)
        undo_attach(inner)
        unwatch(inner)
        recompose(inner, unused=True)
        if was_attached:
            arrange(inner)
            watch(inner)

    try:
        # Before products, as attach does.
        decompose_for(model, [name for name in names if _is_called(model, name, state)])
        for name in _multiplying_modules_in(state):
            if name in names:
                multiplying.append(_quantize_products_from(model.get_submodule(name), name, state))
        own_weight = quantizable_layers(model, embeddings=True)
        for name in quantized_in(state):
            if name not in names:
                continue
            layer = model.get_submodule(name)
            if isinstance(layer, QuantizedLayer):
                if layer.input_quantizer is None:
                    without_inputs.append((layer, None))
                    layer.input_quantizer = _build(layer, name, "input_quantizer", state)
                continue
            tied = None if name in own_weight else _tied_in(model, name, state)
            _check(layer, name, state, tied)
            owner = shared_weight(layer) if tied is None else tied.tensor
            weights = _shared_quantizer(shared, owner, _tensors(name, "weight_quantizer", state))
            if weights is None:
                weights = _build(layer, name, "weight_quantizer", state)
                shared.setdefault(id(owner), []).append((weights.state_dict(), weights))
            if tied is not None:
                readers.append(tie(tied, weights))
                continue
            inputs = _path(name, "input_quantizer.state") in state
            switch(layer, weights, _build(layer, name, "input_quantizer", state) if inputs else None)
            layers.append(cast(QuantizedLayer, layer))
        arrange(inner)
    except Exception:
        undo()
        raise
    # Read before the new layers get an origin.
    plain = frozenset(
        n for n, m in quantizable_layers(model, embeddings=True).items() if not isinstance(m, QuantizedLayer)
    )
    plain |= {f"{n}.{part}".lstrip(".") for n, _, _, parts in decomposable(model) for part in parts}
    new = set(layers)
    for name, layer in quantized_layers(model):
        if layer in new:
            set_origin(layer, Origin(name, None, plain))
    watch(inner)
    return undo


def _is_called(model: nn.Module, name: str, state: Mapping[str, Any]) -> bool:
    """Whether a forward has called a layer that the model has. A forward of ``nn.MultiheadAttention`` that was not
    decomposed, as in states of earlier versions, has only read the weight of its out-projection.
    """
    inputs = state.get(_path(name, "input_quantizer.state"))
    if _path(name, "weight") not in model.state_dict() or not isinstance(inputs, Tensor):
        return True
    return inputs.is_meta or read(inputs)[0].fitted


def _path(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _tensors(name: str, part: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    prefix = _path(name, f"{part}.")
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def _multiplying_modules_in(state: Mapping[str, Any]) -> list[str]:
    return [key[: -len(STATE)].rstrip(".") for key in state if key == STATE or key.endswith(f".{STATE}")]


def _tied_in(model: nn.Module, name: str, state: Mapping[str, Any]) -> Tied | None:
    """The tied Parameter of a module that is no layer, whose weight quantizer a state has."""
    if _path(name, "input_quantizer.state") in state:
        return None
    module = model.get_submodule(name)
    tied = [t for t in tied_to_layers(model) if t.module is module]
    # If the model is only a part, without the layer that the module is tied to, a single matrix must be the weight.
    matrices = [key for key, p in module._parameters.items() if p is not None and p.dim() > 1]
    return tied[0] if tied else Tied(name, module, matrices[0]) if len(matrices) == 1 else None


def _check(layer: nn.Module, name: str, state: Mapping[str, Any], tied: Tied | None) -> None:
    if tied is None and not holds_weight(layer) and not looks_up(layer):
        raise StateDictError(
            f"The state_dict has quantizers of the layer {name!r}, which is {type(layer).__name__} here, and not a "
            "convolution or linear layer with a weight: build the model as it was when it was saved."
        )
    weight = cast(Tensor, layer.weight) if tied is None else tied.tensor
    scales = state.get(_path(name, "weight_quantizer.log_scale"))
    if not isinstance(scales, Tensor):
        return
    size, counts, what = _group_size(name, state), {1, *weight.shape[:2]}, "channel"
    if size:
        counts = {len(weight) * group_count(weight.shape[1], size)} if weight.dim() == 2 else set()
        what = f"group of {size} inputs"
    if len(scales) not in counts:
        raise StateDictError(
            f"The state_dict has {len(scales)} scales of the layer {name!r}, one per {what}, but its weight has the "
            f"shape {tuple(weight.shape)} here: build the model as it was when it was saved."
        )


def _group_size(name: str, state: Mapping[str, Any]) -> int:
    """The group size of a layer's weight in a state; 0 without groups, or if the state cannot be read yet."""
    settings = state[_path(name, _MARK)]
    if not isinstance(settings, Tensor) or settings.is_meta:
        return 0
    try:
        return read(settings)[0].group_size
    except ValueError:
        # Building the quantizer raises an error with the name of the layer.
        return 0


def _build(layer: nn.Module, name: str, part: str, state: Mapping[str, Any]) -> Quantizer:
    try:
        quantizer = Quantizer.from_state(_tensors(name, part, state))
    except (RuntimeError, ValueError) as error:
        raise StateDictError(f"The state_dict's {_path(name, part)} cannot be read: {error}") from error
    like = next((t for t in (*layer.parameters(), *weight_parameters(layer)) if not t.is_meta), None)
    return (quantizer if like is None else quantizer.to(like.device)).train(layer.training)


def _shared_quantizer(
    shared: Mapping[int, list[tuple[dict[str, Tensor], Quantizer]]], owner: object, tensors: dict[str, Tensor]
) -> Quantizer | None:
    """The quantizer of another module with the same Parameter and an equal quantizer state, if any."""
    for known, quantizer in shared.get(id(owner), ()):
        equal = (torch.equal(known[key].cpu(), value.cpu()) for key, value in tensors.items() if key in known)
        if known.keys() == tensors.keys() and all(equal):
            return quantizer
    return None


def _quantize_products_from(module: nn.Module, name: str, state: Mapping[str, Any]) -> QuantizedProducts:
    plan, counts = plan_of(state[_path(name, STATE)])
    operands = {}
    for operand in operand_names(plan):
        path = _path(name, f"product_operands.{operand}")
        operands[operand] = _build(module, path, "input_quantizer", state)
    switched = quantize_products(module, plan, counts, operands, "input_quantizer")
    remember_plan(switched)
    return switched
