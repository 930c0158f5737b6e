"""Weights that torch computes from other tensors: parametrizations, the older hook-based ones, and pruning masks.

A parametrization computes the weight each time it is read. The older ones (``torch.nn.utils.weight_norm``,
``spectral_norm``, pruning) store the weight in an attribute before each forward; after an update it is out of date.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from cpq_lightning.attach.calls import in_evaluation
from cpq_lightning.attach.class_switch import original_class
from cpq_lightning.attach.decomposed import ParameterLayer, holder_of

M = TypeVar("M", bound=nn.Module)


def weight_now(layer: nn.Module) -> Tensor:
    """The current weight; reading it does not advance a parametrization that updates itself in training."""
    if isinstance(layer, ParameterLayer):
        return layer.part.weight_in(_tensor_now(*holder_of(layer.owner, layer.part.weight)))
    return _tensor_now(layer, "weight")


def _tensor_now(layer: nn.Module, name: str) -> Tensor:
    hook = next((hook for _, hook in reversed(list(_hooks(layer, name)))), None)
    if isinstance(hook, WeightNorm):
        return hook.compute_weight(layer)
    if isinstance(hook, SpectralNorm):
        return hook.compute_weight(layer, do_power_iteration=False)
    if isinstance(hook, BasePruningMethod):
        return hook.apply_mask(layer)
    computed = layer._modules.get("parametrizations")
    with nullcontext() if computed is None else in_evaluation(computed):
        return cast(Tensor, getattr(layer, name))


def is_computed(layer: nn.Module) -> bool:
    """Whether a layer's weight is computed, instead of being a Parameter of the layer."""
    return layer._parameters.get("weight") is None


def computing(layer: nn.Module) -> dict[str, Tensor]:
    """The tensors that a layer's weight is computed from, by name in its ``state_dict``; empty for a plain weight."""
    if not is_computed(layer):
        return {}
    state = {n: t for n, t in layer.state_dict(keep_vars=True).items() if not n.startswith("weight_quantizer.")}
    return {n: t for n, t in state.items() if n.startswith(("weight_", "parametrizations.weight."))}


def leave_computed(layer: nn.Module) -> nn.Parameter:
    """Remove what computes a layer's weight, so that a Parameter remains; a weight that is a Parameter is kept."""
    if isinstance(layer, ParameterLayer):
        return _leave_computed(*holder_of(layer.owner, layer.part.weight))
    return _leave_computed(layer, "weight")


def computed_from(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The Parameters that a tensor of a module is computed from; the Parameter itself if it is one."""
    parameter = module._parameters.get(name)
    if parameter is not None:
        return [parameter]
    prefixes = (f"{name}_", f"parametrizations.{name}.")
    return [p for n, p in module.named_parameters() if n.startswith(prefixes)]


def _leave_computed(layer: nn.Module, name: str) -> nn.Parameter:
    if is_parametrized(layer, name):
        # torch deletes the property from the class, which copies of the layer share.
        original_class(layer)
        # If the weight was made of several tensors, torch would leave a buffer when gradients are disabled.
        with torch.enable_grad():
            remove_parametrizations(layer, name, leave_parametrized=True)
    for handle, hook in list(_hooks(layer, name)):
        hook.remove(layer)
        layer._forward_pre_hooks.pop(handle, None)
    weight = layer._parameters[name]
    assert weight is not None
    return weight


def _hooks(layer: nn.Module, name: str) -> Iterator[tuple[int, Any]]:
    hooks: dict[int, Any] = layer._forward_pre_hooks
    for handle, hook in hooks.items():
        if getattr(hook, "_tensor_name", getattr(hook, "name", None)) == name and hasattr(hook, "remove"):
            yield handle, hook


def copied(model: M) -> M:
    """A deep copy, also after a forward that left a weight with a graph in an attribute, which torch does not copy."""
    tensors = (v for module in model.modules() for v in vars(module).values() if isinstance(v, Tensor))
    made = copy.deepcopy(model, {id(t): t.detach().clone() for t in tensors if not t.is_leaf})
    for module in made.modules():
        _leave_compiled_code(module)
    return made


def _leave_compiled_code(module: nn.Module) -> None:
    """Let a copied module run its own methods: compiled ones, as Lightning makes them, are bound to the original."""
    for name, value in list(vars(module).items()):
        compiled = getattr(value, "_torchdynamo_orig_callable", None)
        if compiled is not None and getattr(compiled, "__func__", compiled) is getattr(type(module), name, None):
            delattr(module, name)
