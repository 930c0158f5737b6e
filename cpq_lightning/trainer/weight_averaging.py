"""Quantizer state in the averaged models of averaging callbacks."""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

import torch

from cpq_lightning.attach.layers import quantizers
from cpq_lightning.trainer import private

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


@torch.no_grad()
def share_with_averages(trainer: Trainer, pl_module: LightningModule, refitted: Container[str] = ()) -> None:
    """Copy the quantizers' buffers into the averaged models of Lightning's averaging callbacks.

    Widths, signs and initial scales must be copied, because an average of two different values is not valid. Learned
    parameters are averaged, except those of ``refitted`` quantizers: earlier values belong to other scales.

    Args:
        trainer: The trainer with the callbacks.
        pl_module: The attached module.
        refitted: Names of the quantizers whose parameters are copied too.
    """
    for average in private.averaged_models(trainer):
        averaged_quantizers = dict(quantizers(average))
        for name, quantizer in quantizers(pl_module):
            averaged = averaged_quantizers.get(name)
            if averaged is None:
                continue
            averaged.take_state(quantizer)
            if name in refitted:
                for parameter, averaged_parameter in zip(quantizer.parameters(), averaged.parameters(), strict=True):
                    averaged_parameter.copy_(parameter)
