"""The parameter groups of a third-party optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from cpq_lightning.optim.optimizer_hook import nested


def largest_group(optimizer: Optimizer) -> dict[str, Any]:
    """The group with the most elements; the first one of equals."""
    return max(optimizer.param_groups, key=lambda group: sum(p.numel() for p in group["params"]))


def holds_parameters(optimizer: Optimizer) -> bool:
    """Whether any group has parameters; Lightning's placeholder for a missing optimizer has no groups."""
    return any(group["params"] for group in optimizer.param_groups)


def release(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Remove parameters and their state from an optimizer, by identity, since tensors compare by value."""
    ids = {id(p) for p in parameters}
    for inner in nested(optimizer):
        for group in inner.param_groups:
            keep = [i for i, p in enumerate(group["params"]) if id(p) not in ids]
            if len(keep) < len(group["params"]):
                # In place, since LBFGS keeps a reference to the list.
                for key in ("params", "param_names"):
                    if key in group:
                        group[key][:] = [group[key][i] for i in keep]
        for parameter in [p for p in inner.state if id(p) in ids]:
            del inner.state[parameter]
