"""The groups of an optimizer that somebody else has made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from cpq_lightning.optim.optimizer_hook import nested


def largest_group(optimizer: Optimizer) -> dict[str, Any]:
    """The group with the most elements, the first of several."""
    return max(optimizer.param_groups, key=lambda group: sum(p.numel() for p in group["params"]))


def holds_parameters(optimizer: Optimizer) -> bool:
    """Whether there is anything in its groups; Lightning's stand-in for no optimizer has no group at all."""
    return any(group["params"] for group in optimizer.param_groups)


def release(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Take parameters, and their state, out of an optimizer; by identity, since tensors compare by value."""
    ids = {id(p) for p in parameters}
    for held in nested(optimizer):
        for group in held.param_groups:
            keep = [i for i, p in enumerate(group["params"]) if id(p) not in ids]
            if len(keep) < len(group["params"]):
                # In place: LBFGS holds on to the list itself.
                for key in ("params", "param_names"):
                    if key in group:
                        group[key][:] = [group[key][i] for i in keep]
        for parameter in [p for p in held.state if id(p) in ids]:
            del held.state[parameter]
