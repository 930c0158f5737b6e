"""A parameter group of their own for the quantizers, in an optimizer and its schedulers that exist already."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from cpq_lightning.nn import is_sharded

GROUP_NAME = "cpq_quantizers"
# Per-group settings that are learning rates, here and in torch's schedulers: they take the quantizers' factor.
_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
# Per-group lists of torch's and timm's schedulers. Those that hold rates take the factor too.
_RATE_LISTS = ("base_lrs", "min_lrs", "max_lrs", "_last_lr", "base_values")
_OTHER_LISTS = ("lr_lambdas", "base_momentums", "max_momentums")


def takes_quantizers(optimizer: Optimizer) -> bool:
    """Whether an optimizer takes a second group and one-dimensional parameters.

    LBFGS takes one group only, Muon matrices only; both say so in their constructor, so another of the same class and
    settings is made on two small parameters. Beside sharded parameters whole ones have no place: neither updates nor
    norms of gradients may mix them.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        return False
    if any(is_sharded(p) for group in optimizer.param_groups for p in group["params"]):
        return False
    accepted = inspect.signature(type(optimizer).__init__).parameters
    settings = {key: value for key, value in optimizer.defaults.items() if key in accepted}
    groups = [{"params": [nn.Parameter(torch.zeros(2, 2))]}, {"params": [nn.Parameter(torch.zeros(1))]}]
    try:
        type(optimizer)(groups, **settings)  # type: ignore[arg-type]
    except ValueError:
        return False
    except Exception:
        return True
    return True


def adopt(
    optimizer: Optimizer, parameters: Iterable[nn.Parameter], schedulers: Sequence[Any], lr_factor: float
) -> dict[str, Any]:
    """Give parameters one group of their own: no weight decay, ``lr_factor`` times the rate, all else as the largest.

    Schedulers made before are extended by an entry, so that they go on and drive the new group in proportion. A group
    that holds just these parameters already, as somebody has restored it, stays in its place.

    Args:
        optimizer: The optimizer; groups that hold some of the parameters lose them.
        parameters: The quantizers' parameters.
        schedulers: Schedulers of this optimizer, wrapped ones found inside.
        lr_factor: Learning rate relative to that of the group with the most elements.

    Returns:
        The new group.
    """
    parameters = list(parameters)
    ids = {id(p) for p in parameters}
    for group in optimizer.param_groups:
        if group.get("name") == GROUP_NAME and {id(p) for p in group["params"]} == ids:
            return group
    release(optimizer, parameters)
    model_group = max(optimizer.param_groups, key=lambda g: sum(p.numel() for p in g["params"]))
    group = {
        key: value * lr_factor if key in _RATES else value
        for key, value in model_group.items()
        if key not in ("params", "param_names", "name")
    }
    group |= {"params": parameters, "weight_decay": 0.0, "name": GROUP_NAME}
    if all("param_names" in g for g in optimizer.param_groups):
        group["params"] = [(f"{GROUP_NAME}.{i}", p) for i, p in enumerate(parameters)]
    optimizer.add_param_group(group)
    for scheduler in schedulers:
        _extend(scheduler, optimizer, lr_factor)
    return optimizer.param_groups[-1]


def release(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Take parameters out of the groups that hold them; by identity, since tensors compare by value."""
    ids = {id(p) for p in parameters}
    for group in optimizer.param_groups:
        keep = [i for i, p in enumerate(group["params"]) if id(p) not in ids]
        if len(keep) < len(group["params"]):
            # In place: LBFGS holds on to the list itself.
            for key in ("params", "param_names"):
                if key in group:
                    group[key][:] = [group[key][i] for i in keep]


def _extend(scheduler: Any, optimizer: Optimizer, lr_factor: float) -> None:
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        return
    for inner in getattr(scheduler, "_schedulers", ()):
        _extend(inner, optimizer, lr_factor)
    groups = len(optimizer.param_groups)
    for name in (*_RATE_LISTS, *_OTHER_LISTS):
        values = scheduler.__dict__.get(name)
        if isinstance(values, list | tuple) and len(values) == groups - 1:
            first = values[0]
            entry = first * lr_factor if name in _RATE_LISTS and first is not None else first
            setattr(scheduler, name, type(values)([*values, entry]))
