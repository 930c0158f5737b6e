"""Models inside wrappers: what others put around one to compile it, to spread it, or to cast its inputs."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, whose layers have their own names: inside ``torch.compile``, DistributedDataParallel, Fabric.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> unwrapped(nn.DataParallel(net)) is net
        True
    """
    while True:
        parts = model._modules
        if isinstance(model, DataParallel | DistributedDataParallel):
            inner = parts["module"]
        else:
            # Names in torch's OptimizedModule and in Fabric's module; neither has another way that needs no import.
            inner = parts.get("_orig_mod", parts.get("_original_module"))
        if inner is None:
            return model
        model = inner


def check_unspread(model: nn.Module) -> None:
    """Refuse to add Parameters to a model that several processes train already.

    Raises:
        ValueError: it is, or has, a DistributedDataParallel of several processes, which would not know of them.
    """
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) and (count := dist.get_world_size(module.process_group)) > 1:
            raise ValueError(
                f"The model is inside DistributedDataParallel with {count} processes, which "
                "averages the gradients of the Parameters that it found when it was made: those of the quantizers "
                "would part on each process. Attach, or load, the model itself first, and wrap it then."
            )
