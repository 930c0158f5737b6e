"""Which part of a LightningModule is the network, which part ships, and what it is called."""

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
    """The innermost part that holds all of some layers, given by their names; the whole, where they share none."""
    levels = zip(*(name.split(".")[:-1] for name in layers), strict=False)
    shared = [level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels)]
    return pl_module.get_submodule(".".join(shared))


def exported_name(pl_module: LightningModule) -> str:
    """The name of its files: that of a timm backbone, or of the module's class."""
    backbone = pl_module.hparams.get("backbone")
    if isinstance(backbone, str) and hasattr(pl_module, "export_architecture"):
        return re.sub(r"[^\w.-]", "_", backbone.rpartition(":")[2])
    return type(pl_module).__name__


def exported_part(pl_module: LightningModule) -> nn.Module:
    """What ships of a LightningModule: what its ``export_module()`` returns; the whole, where it has a forward; or the
    part of it that holds all quantized layers.
    """
    return exported_candidates(pl_module)[0]


def exported_candidates(pl_module: LightningModule) -> list[nn.Module]:
    """What ships, and behind it what may see the same input where that itself is never called."""
    chosen = getattr(pl_module, "export_module", None)
    if chosen is not None:
        return [chosen()]
    network = part_with(pl_module, (name for name, _ in quantized_layers(pl_module)))
    return [pl_module, network] if overrides(pl_module, "forward") else [network]


def exported_architecture(pl_module: LightningModule) -> dict[str, Any] | None:
    """How timm builds what ships, where the module knows."""
    known = getattr(pl_module, "export_architecture", None)
    return None if known is None else known()
