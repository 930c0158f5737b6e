"""When CPQCallback finds activation ranges."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer

from cpq_lightning.callbacks._calibration import calibrate_for_training, lacks_ranges
from cpq_lightning.callbacks._company import counts_operations
from cpq_lightning.nn import Quantizer


class FindsRanges(Callback):
    """The hooks of CPQCallback that have to do with finding ranges only."""

    calibration_batches: int
    _quantizers: list[Quantizer]
    _audited: bool
    _resumed: bool
    _uncalibrated = False

    def _begin_calibration(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._uncalibrated = True
        # The loaders of a run that is resumed get their state later, with which they have to begin.
        if not self._resumed and trainer.ckpt_path is None:
            self._calibrate(trainer, pl_module)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._calibrate(trainer, pl_module)

    def _calibrate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate a fit that has not been yet, where it lacks anything."""
        if self._uncalibrated and _lacks(trainer, self._quantizers, self._resumed):
            self._audited = calibrate_for_training(trainer, pl_module, self.calibration_batches) or self._audited
        self._uncalibrated = False


def _lacks(trainer: Trainer, quantizers: Sequence[Quantizer], resumed: bool) -> bool:
    # What is learned has to know before training which layers are first and last, and what they multiply.
    learned = counts_operations(trainer) or any(q.gates.learned for q in quantizers)
    unmeasured = learned and not any(q.order for q in quantizers)
    return unmeasured or lacks_ranges(quantizers, resumed)
