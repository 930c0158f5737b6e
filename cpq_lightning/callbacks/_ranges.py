"""When CPQCallback finds activation ranges: before training, and for the evaluation of a module never fitted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from cpq_lightning.callbacks._attachment import attach_module
from cpq_lightning.callbacks._calibration import calibrate_for_training, lacks_ranges
from cpq_lightning.callbacks._company import counts_operations
from cpq_lightning.callbacks._evaluation import LentRanges, begin_afresh, lend_ranges, note_evaluated
from cpq_lightning.config import CPQConfig
from cpq_lightning.nn import Quantizer


class FindsRanges(Callback):
    """The hooks of CPQCallback that have to do with finding ranges only."""

    config: CPQConfig
    quantize_from: int | float
    calibration_batches: int
    _quantizers: list[Quantizer]
    _audited: bool
    _resumed: bool
    _uncalibrated = False
    _lent: LentRanges | None = None

    def _attach(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> bool:
        """Quantize the module where it is not yet; whether it has been done now."""
        fresh = attach_module(trainer, pl_module, self.config)
        if not fresh:
            begin_afresh(pl_module, stage == "fit")
        elif stage != "fit":
            note_evaluated(pl_module)
        return fresh

    # Before training --------------------------------------------------------------------------------------------------

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

    # Without training -------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._lent = lend_ranges(trainer, pl_module, self.calibration_batches, self.quantize_from)

    on_test_start = on_predict_start = on_validation_start

    def on_test_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if self._lent is not None:
            self._lent.calibrate(trainer)

    on_predict_batch_start = on_test_batch_start

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_back_ranges()

    on_predict_end = on_test_end

    def _take_back_ranges(self) -> None:
        if self._lent is not None:
            self._lent.take_back()
            self._lent = None


def _lacks(trainer: Trainer, quantizers: Sequence[Quantizer], resumed: bool) -> bool:
    # What is learned has to know before training which layers are first and last, and what they multiply.
    learned = counts_operations(trainer) or any(q.gates.learned for q in quantizers)
    unmeasured = learned and not any(q.order for q in quantizers)
    return unmeasured or lacks_ranges(quantizers, resumed)
