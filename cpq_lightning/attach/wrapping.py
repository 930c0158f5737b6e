"""Models inside wrappers: what others put around one to compile it, to spread it, or to cast its inputs."""

from __future__ import annotations

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
        inner = model.module if isinstance(model, DataParallel | DistributedDataParallel) else None
        # Names in torch's OptimizedModule and in Fabric's module; neither has another way that needs no import.
        for name in ("_orig_mod", "_original_module"):
            inner = inner or model._modules.get(name)
        if inner is None:
            return model
        model = inner
