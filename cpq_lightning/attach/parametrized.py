"""Weights that torch computes from other tensors: parametrizations, their older kind with hooks, pruning masks.

A parametrization computes its weight whenever it is read. The older ones (``torch.nn.utils.weight_norm``,
``spectral_norm``, pruning) leave it in an attribute before each forward, which is out of date from the next update on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from cpq_lightning.attach.class_switch import original_class

M = TypeVar("M", bound=nn.Module)


def weight_now(layer: nn.Module) -> Tensor:
    """A layer's weight, for who only looks at it: what computes it in training counts nothing by it."""
    hook = next((hook for _, hook in reversed(list(_hooks(layer)))), None)
    if isinstance(hook, WeightNorm):
        return hook.compute_weight(layer)
    if isinstance(hook, SpectralNorm):
        return hook.compute_weight(layer, do_power_iteration=False)
    if isinstance(hook, BasePruningMethod):
        return hook.apply_mask(layer)
    computed = layer._modules.get("parametrizations")
    modes = {} if computed is None else {module: module.training for module in computed.modules()}
    try:
        for module in modes:
            module.training = False
        return cast(Tensor, layer.weight)
    finally:
        for module, training in modes.items():
            module.training = training


def is_computed(layer: nn.Module) -> bool:
    """Whether a layer's weight is computed, rather than a Parameter of its own."""
    return layer._parameters.get("weight") is None


def computing(layer: nn.Module) -> dict[str, Tensor]:
    """What a layer's weight is computed from, by its name in the layer's ``state_dict``; nothing of a plain one."""
    if not is_computed(layer):
        return {}
    state = {n: t for n, t in layer.state_dict(keep_vars=True).items() if not n.startswith("weight_quantizer.")}
    return {n: t for n, t in state.items() if n.startswith(("weight_", "parametrizations.weight."))}


def leave_computed(layer: nn.Module) -> nn.Parameter:
    """Take away what computes a layer's weight, of which a Parameter is left; one that is a Parameter stays."""
    if is_parametrized(layer, "weight"):
        # The property is deleted from the class, which torch lets copies of the layer share.
        original_class(layer)
        # Without gradients torch would leave a buffer where a Parameter was made of several tensors.
        with torch.enable_grad():
            remove_parametrizations(layer, "weight", leave_parametrized=True)
    for handle, hook in list(_hooks(layer)):
        hook.remove(layer)
        layer._forward_pre_hooks.pop(handle, None)
    weight = layer._parameters["weight"]
    assert weight is not None
    return weight


def _hooks(layer: nn.Module) -> Iterator[tuple[int, Any]]:
    hooks: dict[int, Any] = layer._forward_pre_hooks
    for handle, hook in hooks.items():
        if getattr(hook, "_tensor_name", getattr(hook, "name", None)) == "weight" and hasattr(hook, "remove"):
            yield handle, hook


def copied(model: M) -> M:
    """A deep copy, also behind a forward that has left a weight with a graph in an attribute, which torch refuses to
    copy.
    """
    tensors = (v for module in model.modules() for v in vars(module).values() if isinstance(v, Tensor))
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in tensors if not t.is_leaf})
