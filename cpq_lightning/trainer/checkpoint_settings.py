"""Checkpoints that were trained with other settings than a callback asks for: theirs run, and a warning says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from cpq_lightning.attach.layers import quantizers
from cpq_lightning.attach.loading import explain_with
from cpq_lightning.attach.origin import attached_config
from cpq_lightning.checkpoint import CHECKPOINT_KEY, differences, take_settings
from cpq_lightning.config import CPQConfig

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def explain_refusal(module: nn.Module) -> str:
    """How the settings of a module differ from those of the checkpoint that its Trainer restores; else empty."""
    trainer = getattr(module, "_trainer", None)
    checkpoint = None if trainer is None else trainer._checkpoint_connector._loaded_checkpoint
    saved = (checkpoint or {}).get(CHECKPOINT_KEY, {}).get("config")
    asked = attached_config(module)
    if saved is None or asked is None:
        return ""
    different = differences(asked, CPQConfig(**saved), "in the checkpoint")
    return f"They differ in {different}." if different else ""


explain_with(explain_refusal)


class RequestedSettings:
    """What a module was quantized with before a checkpoint is restored into it.

    Args:
        pl_module: The module.
    """

    def __init__(self, pl_module: LightningModule) -> None:
        self._bits = {name: q.bits for name, q in quantizers(pl_module)}
        self._compared = False

    def compare(self, pl_module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Called with what is restored."""
        self._compared = bool(checkpoint.get(CHECKPOINT_KEY, {}).get("config"))
        message = take_settings(pl_module, checkpoint)
        if message:
            rank_zero_warn(message)

    def compare_widths(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called at the start of an evaluation: a checkpoint of weights alone has no config, and says its widths."""
        if self._compared or trainer.ckpt_path is None:
            return
        self._compared = True
        other = [
            f"{name} {q.bits} bits, {self._bits[name]} asked for"
            for name, q in quantizers(pl_module)
            if name in self._bits and q.bits != self._bits[name] and not (q.fixed or q.gates.learned or q.first_or_last)
        ]
        if other:
            rank_zero_warn(
                f"The checkpoint has other widths than {type(pl_module).__name__} was quantized with here, and runs "
                f"with its own: {'; '.join(other)}."
            )
