"""Wrapped models: wrappers that compile a model, distribute it, or cast its inputs."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of ``torch.compile``, DistributedDataParallel or Fabric wrappers, with its original names.

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
            # Attribute names of torch's OptimizedModule and of Fabric's module; checking their types needs an import.
            inner = parts.get("_orig_mod", parts.get("_original_module"))
        if inner is None:
            return model
        model = inner


def check_unspread(model: nn.Module) -> None:
    """Refuse to add Parameters to a model that several processes train already.

    Raises:
        ValueError: it is, or has, a DistributedDataParallel of several processes, which would not synchronize the new
            Parameters.
    """
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) and (count := dist.get_world_size(module.process_group)) > 1:
            raise ValueError(
                f"The model is inside DistributedDataParallel with {count} processes, which averages only the "
                "gradients of Parameters that existed when it was created: those of the quantizers would differ "
                "between processes. Attach, or load, the model itself first, and wrap it then."
            )
