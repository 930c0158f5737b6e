"""Checkpoints whose quantization settings differ from those requested: the checkpoint's are used, with a warning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from cpq_lightning.attach.layers import quantizers
from cpq_lightning.attach.loading import explain_with
from cpq_lightning.attach.origin import attached_config
from cpq_lightning.checkpoint import STAGE_KEY, differences, saved_config, stage_message, take_settings
from cpq_lightning.trainer import private

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def explain_refusal(module: nn.Module) -> str:
    """How a module's settings differ from those of the checkpoint that its Trainer restores; empty if they agree."""
    trainer = private.trainer_of(module)
    checkpoint = None if trainer is None else private.loaded_checkpoint(trainer)
    saved, requested = saved_config(checkpoint or {}), attached_config(module)
    if saved is None or requested is None:
        return ""
    difference = differences(requested, saved, "in the checkpoint")
    return f"They differ in {difference}." if difference else ""


explain_with(explain_refusal)


class RequestedSettings:
    """The settings that a module was quantized with before a checkpoint is restored into it.

    Args:
        pl_module: The module.
    """

    def __init__(self, pl_module: LightningModule) -> None:
        self._bits = {name: q.bits for name, q in quantizers(pl_module)}
        self._compared = False

    def compare(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Adopt the settings of the restored checkpoint, and warn if they differ from the module's."""
        self._compared = saved_config(checkpoint) is not None
        narrowing = checkpoint.get(STAGE_KEY, {}).get("callback") in [c.state_key for c in trainer.callbacks]  # type: ignore[attr-defined]
        stage = "" if trainer.state.fn == "fit" and narrowing else stage_message(checkpoint)
        for message in (take_settings(pl_module, checkpoint), stage):
            if message:
                rank_zero_warn(message)

    def compare_widths(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn at the start of an evaluation if the checkpoint has no config, and other widths than requested."""
        if self._compared or trainer.ckpt_path is None:
            return
        self._compared = True
        mismatched = [
            f"{name} {q.bits} bits, {self._bits[name]} asked for"
            for name, q in quantizers(pl_module)
            if name in self._bits and q.bits != self._bits[name] and not (q.fixed or q.gates.learned or q.first_or_last)
        ]
        if mismatched:
            rank_zero_warn(
                f"The checkpoint has other widths than {type(pl_module).__name__} was quantized with here; the widths "
                f"of the checkpoint are used: {'; '.join(mismatched)}."
            )
