"""When CPQCallback finds activation ranges: before training, and for the evaluation of a module never fitted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from cpq_lightning.attach.attach import refit
from cpq_lightning.attach.layers import quantizers
from cpq_lightning.attach.range_tracking import RangeTracker, is_due, refit_rewritten
from cpq_lightning.config import CPQConfig
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.optim.auxiliary import AuxiliaryOptimizer
from cpq_lightning.trainer.calibration import calibrate_for_training, lacks_ranges
from cpq_lightning.trainer.checkpoint_settings import RequestedSettings
from cpq_lightning.trainer.checks import counts_operations
from cpq_lightning.trainer.evaluation import TemporaryRanges, use_temporary_ranges
from cpq_lightning.trainer.lightning_names import Callback
from cpq_lightning.trainer.progress import run_step
from cpq_lightning.trainer.weight_averaging import share_with_averages


class RangeHooks(Callback):
    """The hooks of CPQCallback that have to do with finding ranges only."""

    config: CPQConfig
    quantize_from: int | float
    calibration_batches: int
    _quantizers: list[Quantizer]
    _audited: bool
    _resumed: bool
    start_step: int
    _companions: list[AuxiliaryOptimizer]
    _uncalibrated = False
    _tracker: RangeTracker | None = None
    _tracked = 0
    _stance: Any = None
    _lent: TemporaryRanges | None = None
    _let: Sequence[Quantizer] = ()
    _asked: RequestedSettings | None = None

    # Before training --------------------------------------------------------------------------------------------------

    def _begin_calibration(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._uncalibrated = True
        # The loaders of a run that is resumed get their state later, with which they have to begin; and some strategies
        # do not tell yet whether it is.
        known = not trainer.strategy.restore_checkpoint_after_setup
        if known and not self._resumed and trainer.ckpt_path is None:
            self._calibrate(trainer, pl_module)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._calibrate(trainer, pl_module)
        self._calibrate_rewritten(trainer, pl_module)

    def _calibrate_rewritten(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate again where a hook of the module's has initialized weights since: inputs are others as well."""
        if all(q.active for q in self._quantizers) and RangeTracker(pl_module).renew_weights():
            self._uncalibrated = True
            self._calibrate(trainer, pl_module, again=True)

    def _calibrate(self, trainer: Trainer, pl_module: LightningModule, again: bool = False) -> None:
        """Calibrate a fit that has not been yet, where it lacks anything."""
        if self._uncalibrated and (again or _lacks(trainer, self._quantizers, self._resumed)):
            self._audited = calibrate_for_training(trainer, pl_module, self.calibration_batches) or self._audited
        self._uncalibrated = False

    # While it goes on -------------------------------------------------------------------------------------------------

    def _track(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before a training batch: look at its activations, where ranges may have been outgrown."""
        # Of a batch that another callback has skipped Lightning tells no end.
        self._compile_again()
        step = run_step(trainer) - self.start_step
        if step < 0 or not all(q.active for q in self._quantizers):
            return
        if self._tracker is None:
            self._tracker = RangeTracker(pl_module, [companion.optimizer for companion in self._companions])
            if step == 0 and self._tracker.renew_weights():
                # Somebody has initialized weights since they were calibrated: inputs are others as well.
                refit(pl_module)
        self._tracked = step
        if is_due(step):
            # Compiled code runs as it was written meanwhile, so that it shows its values.
            self._stance = torch.compiler.set_stance("force_eager")
            self._stance.__enter__()
        self._tracker.before_batch(step)

    def _renew_ranges(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Behind a training batch: fit stale ranges anew, where it has ended a step."""
        self._compile_again()
        if self._tracker is None:
            return
        self._tracker.pause()
        if run_step(trainer) - self.start_step > self._tracked:
            renewed = self._tracker.after_step(self._tracked)
            if renewed:
                share_with_averages(trainer, pl_module, set(renewed))

    def _stop_tracking(self) -> None:
        self._compile_again()
        if self._tracker is not None:
            self._tracker.pause()
        self._tracker = None

    def _compile_again(self) -> None:
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None

    def _let_evaluations_fit(self, pl_module: LightningModule) -> None:
        """Of an evaluation's setup: another callback, such as the BatchSizeFinder, may evaluate ahead of this one."""
        missing = [q for _, q in quantizers(pl_module) if q.kind == "activation" and not (q.fitted or q.settled)]
        self._let = [q for q in missing if not q.fits_next]
        for quantizer in self._let:
            quantizer.fits_next = True

    def _forbid_evaluations_to_fit(self) -> None:
        for quantizer in self._let:
            quantizer.fits_next = False
        self._let = ()

    # Without training -------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            if self._asked is not None:
                self._asked.compare_widths(trainer, pl_module)
            refit_rewritten(pl_module)
        # Some loops, such as the Tuner's, start again without an end.
        self._take_back_ranges()
        self._lent = use_temporary_ranges(trainer, pl_module, self.quantize_from)

    on_test_start = on_predict_start = on_validation_start

    def on_test_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if self._lent is not None:
            self._lent.before_batch()

    on_predict_batch_start = on_test_batch_start

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if self._lent is not None:
            self._lent.after_batch(trainer)

    on_predict_batch_end = on_test_batch_end

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_back_ranges()

    on_predict_end = on_test_end

    def _take_back_ranges(self) -> None:
        if self._lent is not None:
            self._lent.undo_attach()
            self._lent = None


def _lacks(trainer: Trainer, found: Sequence[Quantizer], resumed: bool) -> bool:
    # What is learned has to know before training which layers are first and last, and what they multiply.
    learned = counts_operations(trainer) or any(q.gates.learned for q in found)
    unmeasured = learned and not any(q.execution_index for q in found)
    return unmeasured or lacks_ranges(found, resumed)
