"""When CPQCallback fits ranges: before training, during training, and in evaluations of a module never fitted."""

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
    """The hooks of CPQCallback that fit ranges."""

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
    _tracked_step = 0
    _compile_stance: Any = None
    _temporary_ranges: TemporaryRanges | None = None
    _fitting_next: Sequence[Quantizer] = ()
    _asked: RequestedSettings | None = None

    # Before training --------------------------------------------------------------------------------------------------

    def _begin_calibration(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._uncalibrated = True
        # In a resumed run, the loaders get their state later and must not be read before. Some strategies do not show
        # yet whether the run is resumed.
        resume_known = not trainer.strategy.restore_checkpoint_after_setup
        if resume_known and not self._resumed and trainer.ckpt_path is None:
            self._calibrate(trainer, pl_module)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._calibrate(trainer, pl_module)
        self._calibrate_rewritten(trainer, pl_module)

    def _calibrate_rewritten(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate again if a hook of the module has initialized weights since: the inputs have changed too."""
        if all(q.active for q in self._quantizers) and RangeTracker(pl_module).renew_weights():
            self._uncalibrated = True
            self._calibrate(trainer, pl_module, again=True)

    def _calibrate(self, trainer: Trainer, pl_module: LightningModule, again: bool = False) -> None:
        """Calibrate once per fit, if ranges or the execution order are missing."""
        if self._uncalibrated and (again or _needs_calibration(trainer, self._quantizers, self._resumed)):
            self._audited = calibrate_for_training(trainer, pl_module, self.calibration_batches) or self._audited
        self._uncalibrated = False

    # During training --------------------------------------------------------------------------------------------------

    def _track(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before a training batch: record its activations if ranges are due for a check."""
        # Lightning does not call on_train_batch_end for a batch that another callback has skipped.
        self._restore_compilation()
        step = run_step(trainer) - self.start_step
        if step < 0 or not all(q.active for q in self._quantizers):
            return
        if self._tracker is None:
            self._tracker = RangeTracker(pl_module, [auxiliary.optimizer for auxiliary in self._companions])
            if step == 0 and self._tracker.renew_weights():
                # Weights were initialized after the calibration, so the inputs have changed too.
                refit(pl_module)
        self._tracked_step = step
        if is_due(step):
            # Run compiled code eagerly, so that its values can be recorded.
            self._compile_stance = torch.compiler.set_stance("force_eager")
            self._compile_stance.__enter__()
        self._tracker.before_batch(step)

    def _renew_ranges(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a training batch that ended an optimizer step: fit stale ranges again."""
        self._restore_compilation()
        if self._tracker is None:
            return
        self._tracker.pause()
        if run_step(trainer) - self.start_step > self._tracked_step:
            renewed = self._tracker.after_step(self._tracked_step)
            if renewed:
                share_with_averages(trainer, pl_module, set(renewed))

    def _keep_zeros(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where weights are about to be evaluated or saved: pruned ones get a level 0 before the next due check."""
        optimizers = [auxiliary.optimizer for auxiliary in self._companions]
        if names := refit_rewritten(pl_module, only_zeros=True, optimizers=optimizers):
            share_with_averages(trainer, pl_module, {f"{name}.weight_quantizer" for name in names})

    def _stop_tracking(self) -> None:
        self._restore_compilation()
        if self._tracker is not None:
            self._tracker.pause()
        self._tracker = None

    def _restore_compilation(self) -> None:
        if self._compile_stance is not None:
            self._compile_stance.__exit__(None, None, None)
            self._compile_stance = None

    def _let_evaluations_fit(self, pl_module: LightningModule) -> None:
        """In the setup of an evaluation: another callback, such as BatchSizeFinder, may evaluate before this one."""
        missing = [q for _, q in quantizers(pl_module) if q.kind == "activation" and not (q.fitted or q.settled)]
        self._fitting_next = [q for q in missing if not q.fits_next]
        for quantizer in self._fitting_next:
            quantizer.fits_next = True

    def _forbid_evaluations_to_fit(self) -> None:
        for quantizer in self._fitting_next:
            quantizer.fits_next = False
        self._fitting_next = ()

    # Evaluation -------------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            if self._asked is not None:
                self._asked.compare_widths(trainer, pl_module)
            refit_rewritten(pl_module)
        else:
            self._keep_zeros(trainer, pl_module)
        # Some loops, such as the Tuner's, start again without a call at their end.
        self._take_back_ranges()
        self._temporary_ranges = use_temporary_ranges(trainer, pl_module, self.quantize_from)

    on_test_start = on_predict_start = on_validation_start

    def on_test_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if self._temporary_ranges is not None:
            self._temporary_ranges.before_batch()

    on_predict_batch_start = on_test_batch_start

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if self._temporary_ranges is not None:
            self._temporary_ranges.after_batch(trainer)

    on_predict_batch_end = on_test_batch_end

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_back_ranges()

    on_predict_end = on_test_end

    def _take_back_ranges(self) -> None:
        if self._temporary_ranges is not None:
            self._temporary_ranges.undo_attach()
            self._temporary_ranges = None


def _needs_calibration(trainer: Trainer, all_quantizers: Sequence[Quantizer], resumed: bool) -> bool:
    # Learned widths need the first and last layer, and the layers' multiply-accumulates, before training.
    needs_execution_order = counts_operations(trainer) or any(q.gates.learned for q in all_quantizers)
    lacks_execution_order = needs_execution_order and not any(q.execution_index for q in all_quantizers)
    return lacks_execution_order or lacks_ranges(all_quantizers, resumed)
