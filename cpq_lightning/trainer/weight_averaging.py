"""Quantizer state in the copies that averaging callbacks keep of the model."""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

import torch

from cpq_lightning.attach.layers import quantizers

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


@torch.no_grad()
def share_with_averages(trainer: Trainer, pl_module: LightningModule, refitted: Container[str] = ()) -> None:
    """Give the copies that Lightning's averaging callbacks keep the quantizers' buffers as they are.

    A width, a sign or a starting step has no average: between two of them lies neither. Learned parameters are
    averaged, but of quantizers that were ``refitted``, by name, what was learned before belongs to other steps.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if average is None:
            continue
        copies = dict(quantizers(getattr(average, "module", average)))
        for name, quantizer in quantizers(pl_module):
            copy = copies.get(name)
            if copy is None:
                continue
            copy.take_state(quantizer)
            if name in refitted:
                for own, other in zip(quantizer.parameters(), copy.parameters(), strict=True):
                    other.copy_(own)
