"""Quantizers attached again from a ``state_dict``: which layers, which grids, which widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from cpq_lightning.attach.attach import arrange, take_back, unwatch, watch
from cpq_lightning.attach.layers import QuantizedLayer, is_attached, switch, switch_back
from cpq_lightning.attach.products import (
    STATE,
    QuantizedProducts,
    leave_products,
    operand_names,
    plan_of,
    quantize_products,
    remember_plan,
)
from cpq_lightning.attach.timm_layers import holds_weight, shared_weight
from cpq_lightning.attach.wrapping import check_unspread, unwrapped
from cpq_lightning.nn import Quantizer

_PARTS = ("weight_quantizer", "input_quantizer")
_MARK = "weight_quantizer.state"


def quantized_in(state: Mapping[str, Any]) -> list[str]:
    """Names of the layers that a ``state_dict`` has quantizers of."""
    return [key[: -len(_MARK)].rstrip(".") for key in state if key == _MARK or key.endswith(f".{_MARK}")]


def plain_in(model: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """Names of the layers and of the modules that multiply which are quantized in a state, and are not in a model.

    What the model does not have at all is not among them: whoever loads the state says so.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for name in quantized_in(state):
        module = modules.get(name)
        if module is None:
            continue
        parts = [part for part in _PARTS if _path(name, f"{part}.state") in state]
        if not isinstance(module, QuantizedLayer) or any(getattr(module, part) is None for part in parts):
            found.append(name)
    for name in _multiplying_in(state):
        if name in modules and not isinstance(modules[name], QuantizedProducts):
            found.append(name)
    return found


def attach_state(model: nn.Module, state: Mapping[str, Any]) -> Callable[[], None]:
    """Attach the quantizers that a ``state_dict`` has and a model lacks; loading the state is left to the caller.

    Layers that share a Parameter and equal quantizers share one. Where anything is wrong the model is left as it was.

    Args:
        model: A model, or a part of one, with the layers that the state is of.
        state: Its ``state_dict``, with the names that the model has them by.

    Returns:
        Takes back what this has done.

    Raises:
        ValueError: a quantizer does not fit its layer, its state cannot be read, or the model is inside a
            DistributedDataParallel of several processes.
    """
    names = plain_in(model, state)
    # Names are those of the state, in which a wrapper has a part; hooks are the model's own.
    check_unspread(model)
    inner = unwrapped(model)
    was_attached = is_attached(model)
    shared: dict[int, list[tuple[dict[str, Tensor], Quantizer]]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLayer) and name not in names:
            own = layer.weight_quantizer
            shared.setdefault(id(shared_weight(layer)), []).append((own.state_dict(), own))
    before: list[tuple[QuantizedLayer, Any]] = []
    layers: list[QuantizedLayer] = []
    multiplying: list[QuantizedProducts] = []

    def undo() -> None:
        for layer in layers:
            switch_back(layer, written=False)
        for layer, inputs in before:
            layer.input_quantizer = inputs
        for module in multiplying:
            leave_products(module)
        take_back(inner)
        unwatch(inner)
        if was_attached:
            arrange(inner)
            watch(inner)

    try:
        for name in _multiplying_in(state):
            if name in names:
                multiplying.append(_multiply_quantized(model.get_submodule(name), name, state))
        for name in quantized_in(state):
            if name not in names:
                continue
            layer = model.get_submodule(name)
            if isinstance(layer, QuantizedLayer):
                if layer.input_quantizer is None:
                    before.append((layer, None))
                    layer.input_quantizer = _build(layer, name, "input_quantizer", state)
                continue
            _check(layer, name, state)
            weights = _shared(shared, layer, _tensors(name, "weight_quantizer", state))
            if weights is None:
                weights = _build(layer, name, "weight_quantizer", state)
                shared.setdefault(id(shared_weight(layer)), []).append((weights.state_dict(), weights))
            inputs = _path(name, "input_quantizer.state") in state
            switch(layer, weights, _build(layer, name, "input_quantizer", state) if inputs else None)
            layers.append(cast(QuantizedLayer, layer))
        arrange(inner)
    except Exception:
        undo()
        raise
    watch(inner)
    return undo


def _path(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _tensors(name: str, part: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    prefix = _path(name, f"{part}.")
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def _multiplying_in(state: Mapping[str, Any]) -> list[str]:
    return [key[: -len(STATE)].rstrip(".") for key in state if key == STATE or key.endswith(f".{STATE}")]


def _check(layer: nn.Module, name: str, state: Mapping[str, Any]) -> None:
    if not holds_weight(layer):
        raise ValueError(
            f"The state_dict has quantizers of the layer {name!r}, which is {type(layer).__name__} here, and no "
            "convolution or linear layer with a weight: build the model as it was when it was saved."
        )
    weight, scales = cast(Tensor, layer.weight), state.get(_path(name, "weight_quantizer.log_scale"))
    if isinstance(scales, Tensor) and len(scales) not in (1, *weight.shape[:2]):
        raise ValueError(
            f"The state_dict has {len(scales)} scales of the layer {name!r}, one a channel, and its weight has the "
            f"shape {tuple(weight.shape)} here: build the model as it was when it was saved."
        )


def _build(layer: nn.Module, name: str, part: str, state: Mapping[str, Any]) -> Quantizer:
    try:
        quantizer = Quantizer.from_state(_tensors(name, part, state))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"The state_dict's {_path(name, part)} cannot be read: {error}") from error
    like = next((t for t in layer.parameters() if not t.is_meta), None)
    return (quantizer if like is None else quantizer.to(like.device)).train(layer.training)


def _shared(
    shared: Mapping[int, list[tuple[dict[str, Tensor], Quantizer]]], layer: nn.Module, tensors: dict[str, Tensor]
) -> Quantizer | None:
    """The quantizer of another layer with the same Parameter, where this one's state is the same."""
    for known, quantizer in shared.get(id(shared_weight(layer)), ()):
        equal = (torch.equal(known[key].cpu(), value.cpu()) for key, value in tensors.items() if key in known)
        if known.keys() == tensors.keys() and all(equal):
            return quantizer
    return None


def _multiply_quantized(module: nn.Module, name: str, state: Mapping[str, Any]) -> QuantizedProducts:
    plan, counts = plan_of(state[_path(name, STATE)])
    operands = {}
    for operand in operand_names(plan):
        path = _path(name, f"product_operands.{operand}")
        operands[operand] = _build(module, path, "input_quantizer", state)
    switched = quantize_products(module, plan, counts, operands, "input_quantizer")
    remember_plan(switched)
    return switched
