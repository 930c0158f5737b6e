"""Which part of a LightningModule is the network, which part is exported, and under what name."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from cpq_lightning.attach.layers import quantized_layers
from cpq_lightning.trainer.progress import overrides

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


def part_with(pl_module: LightningModule, layers: Iterable[str]) -> nn.Module:
    """The innermost part that contains all of the named layers; the module itself if they share no other part."""
    levels = zip(*(name.split(".")[:-1] for name in layers), strict=False)
    shared = [level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels)]
    return pl_module.get_submodule(".".join(shared))


def exported_name(pl_module: LightningModule) -> str:
    """The name for exported files: that of the timm backbone, or of the module's class."""
    backbone = pl_module.hparams.get("backbone")
    if isinstance(backbone, str) and hasattr(pl_module, "export_architecture"):
        return re.sub(r"[^\w.-]", "_", backbone.rpartition(":")[2])
    return type(pl_module).__name__


def exported_part(pl_module: LightningModule) -> nn.Module:
    """The exported part of a LightningModule: the result of its ``export_module()``; else the module itself, if it
    defines a forward; else the part that contains all quantized layers.
    """
    return exported_candidates(pl_module)[0]


def exported_candidates(pl_module: LightningModule) -> list[nn.Module]:
    """The exported part, followed by a part that may get the same input if the exported part is never called."""
    export_module = getattr(pl_module, "export_module", None)
    if export_module is not None:
        return [export_module()]
    network = part_with(pl_module, (name for name, _ in quantized_layers(pl_module)))
    return [pl_module, network] if overrides(pl_module, "forward") else [network]


def exported_architecture(pl_module: LightningModule) -> dict[str, Any] | None:
    """The timm settings that build the exported part, if the module has them."""
    export_architecture = getattr(pl_module, "export_architecture", None)
    return None if export_architecture is None else export_architecture()
