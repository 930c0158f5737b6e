"""Which part of a LightningModule is the network, and what it is called."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


def part_with(pl_module: LightningModule, layers: Iterable[str]) -> nn.Module:
    """The innermost part that holds all of some layers, given by their names; the whole, where they share none."""
    levels = zip(*(name.split(".")[:-1] for name in layers), strict=False)
    shared = [level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels)]
    return pl_module.get_submodule(".".join(shared))


def shipped_name(pl_module: LightningModule) -> str:
    """The name of its files: that of a timm backbone, or of the module's class."""
    backbone = pl_module.hparams.get("backbone")
    if isinstance(backbone, str) and hasattr(pl_module, "export_architecture"):
        return re.sub(r"[^\w.-]", "_", backbone.rpartition(":")[2])
    return type(pl_module).__name__
