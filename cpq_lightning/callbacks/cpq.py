"""CPQCallback: quantization-aware training of any LightningModule."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from cpq_lightning.attach.attach import refit, set_active, set_noise_step
from cpq_lightning.attach.audit import Audit, AuditReport
from cpq_lightning.attach.calibrate import CALIBRATION_BATCHES, check_calibration_batches, recording
from cpq_lightning.attach.coverage import recorded_coverage, remember_products
from cpq_lightning.attach.first_forward import (
    auditable,
    broadcast_report,
    forget_first_forwards,
    record_forward,
    record_uncalled,
    report_audit,
)
from cpq_lightning.attach.first_last import settle_first_and_last
from cpq_lightning.attach.layers import quantizers
from cpq_lightning.attach.loading import attach_where
from cpq_lightning.attach.origin import attached_config, quantizable_layers
from cpq_lightning.attach.range_tracking import refit_rewritten
from cpq_lightning.checkpoint import CHECKPOINT_KEY
from cpq_lightning.config import CPQConfig
from cpq_lightning.export.formats import Format
from cpq_lightning.functional.schedule import resolve_point
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.optim.auxiliary import AuxiliaryOptimizer
from cpq_lightning.optim.optimizer_hook import OptimizerHook
from cpq_lightning.report.levels import clipped_shares, full_precision_messages, range_warnings
from cpq_lightning.report.runs import BEFORE, QUANTIZED
from cpq_lightning.report.weight_histograms import weight_histograms
from cpq_lightning.trainer import private
from cpq_lightning.trainer.batches import begin_training, correct_loader_states
from cpq_lightning.trainer.checkpoint_settings import RequestedSettings
from cpq_lightning.trainer.checks import (
    Bests,
    check_callbacks,
    check_learners,
    check_unsharded,
    last_saved,
    monitored_bests,
    monitored_metric,
    quantization_start,
    warn_of_old_bests,
)
from cpq_lightning.trainer.export import RunSamples, check_settings, export_at_fit_end
from cpq_lightning.trainer.model_setup import attach_module, check_layers, forget_configured
from cpq_lightning.trainer.optimizers import restore_auxiliary, train_quantizers, warn_of_left_out
from cpq_lightning.trainer.progress import begin_run, run_folder, run_length, run_step, warn_of_restarted_data
from cpq_lightning.trainer.ranges import RangeHooks
from cpq_lightning.trainer.run_report import (
    record_exports,
    run_manifest,
    validation_metrics,
    what_is_saved,
    write_run_report,
)
from cpq_lightning.trainer.weight_averaging import share_with_averages

# Steps after which to warn that quantizers were never updated: a gradient scaler may skip the first few updates.
_STEPS_UNTIL_WARNING = 20


class CPQCallback(RangeHooks):
    """Train any LightningModule with Cluster-Promoting Quantization, without a change to its code.

    In ``setup``, the callback quantizes the module's convolutions and linear layers in place. It leaves a module that
    is already quantized as it is, for example a :class:`~cpq_lightning.QuantizedModule`. An auxiliary optimizer trains
    the quantizers' parameters; it has the class and the settings of the module's optimizer, without weight decay. The
    parameter groups, schedulers and saved states of the module's optimizer are the same as without quantization.
    Activation ranges are calibrated on training batches before the sanity check. At the end of the fit, the callback
    writes ``levels.json`` to the run's folder and prints each layer's levels and the metrics before and after
    quantization. The run's folder is that of the logger; without a logger it is ``cpq_runs/version_0``,
    ``cpq_runs/version_1``, … in the Trainer's ``default_root_dir``.

    The module's ``state_dict`` has everything that defines the quantized model. To use a checkpoint elsewhere, give
    that Trainer the same callback, or see :func:`~cpq_lightning.load_checkpoint` and :func:`~cpq_lightning.loading`.

    Args:
        config: What to quantize, and how: a config, or a mapping of its settings.
        quantize_from: When quantization begins, as a step count or a fraction of the run. Until then, the network
            trains in full precision. Then all ranges are fitted again, the same on every rank. With 1.0, the entire run
            is in full precision, as a baseline for ``cpq report``.
        lr_factor: Learning rate of the quantizers' parameters, relative to the module's. The parameters are logarithms,
            so a rate of 0.001 under Adam changes a scale by 0.1 % per update. The update clamp limits the change to
            about 10 % at any rate.
        calibration_batches: Number of training batches that calibrate the activation ranges. Training gets these
            batches as well. A module that was never fitted gets ranges from the first batch of an evaluation, for that
            evaluation only.
        levels_file: Name of the file in the run's folder. The same content is written there as CSV and, if matplotlib
            is installed, plots of the levels and weight histograms. ``None`` writes no file and logs no share of
            clipped values.
        monitor: Name of the validation metric by which tables, plots and ``cpq report`` compare runs, written to
            ``levels.json``. ``None`` is the first validation metric that a ModelCheckpoint or EarlyStopping of the
            Trainer monitors; else the only metric of the validation; else none.
        table: Whether to print the tables at the end.
        export: Formats to export the model to at the end, into the run's folder; each file is verified first:
            ``"packed"``, ``"onnx"`` (needs the extra ``onnx``), ``"torch"``. If the forward takes or returns something
            that no file can hold, a warning says so before training, as far as a first forward or
            ``example_input_array`` shows it. An export that fails at the end only warns, with the command to retry it.
        samples: Number of inputs of the first batch to keep (8 MB at most), which trace and verify exports. They are
            written to ``samples.safetensors`` in the run's folder, for ``cpq export``, and not to checkpoints. 0 keeps
            none.

    Attributes:
        run_folder: Folder of the run's files, set from the first step of a fit on; ``None`` if the run writes no file.
        failed_exports: At the end of a fit, the reason why an export failed, by format.

    Raises:
        ImportError: a format needs a package that is not installed.
        MisconfigurationException: the Trainer has a second CPQCallback, a weight-averaging callback before this one, or
            FSDP1; or the module has no layer to quantize.

    Example:
        ``Trainer(callbacks=[CPQCallback(CPQConfig(weight_bits=4, act_bits=4))]).fit(module, data)``
    """

    def __init__(
        self,
        config: CPQConfig = CPQConfig(),  # noqa: B008 - frozen
        *,
        quantize_from: int | float = 0,
        lr_factor: float = 1.0,
        calibration_batches: int = CALIBRATION_BATCHES,
        levels_file: str | None = "levels.json",
        monitor: str | None = None,
        table: bool = True,
        export: Sequence[Format] = (),
        samples: int = 16,
    ) -> None:
        config = CPQConfig.of(config)
        resolve_point("quantize_from", quantize_from, 1)
        if not lr_factor > 0:
            raise ValueError(f"lr_factor must be over 0, got {lr_factor}.")
        check_calibration_batches(calibration_batches)
        # A string is a sequence too: of its letters.
        formats: Any = (export,) if isinstance(export, str) else tuple(export)
        check_settings(formats, samples)
        self.config = config
        self.quantize_from = quantize_from
        self.lr_factor = lr_factor
        self.calibration_batches = calibration_batches
        self.levels_file = levels_file
        self.monitor = monitor
        self.table = table
        self.export: tuple[Format, ...] = formats
        self.samples = samples
        # The step at which quantization begins, once a fit has begun.
        self.start_step = 0
        self.run_folder: Path | None = None
        self.failed_exports: dict[str, str] = {}
        self._first_step = 0
        self._quantizers: list[Quantizer] = []
        self._layers: set[str] = set()
        self._audit: Audit | None = None
        self._audited = self._execution_order_known = False
        # Audit of the first forward in evaluation, and its report.
        self._evaluated: AuditReport | None = None
        self._evaluation_audit: Audit | None = None
        self._audits_evaluation = True
        self._companions: list[AuxiliaryOptimizer] = []
        # Hooks that keep the quantizers' parameters out of optimizers without an auxiliary optimizer.
        self._other_hooks: list[OptimizerHook] = []
        self._recording: Any = None
        self._metrics: dict[str, dict[str, float]] = {}
        # Step of the last validation in full precision.
        self._last_before: int | None = None
        self._histograms_before: dict[str, Any] = {}
        self._bests: Bests = {}
        self._restored: Mapping[str, Any] = {}
        self._resumed = False
        self._coverage_logged = self._never_begins = False
        self._run_samples = RunSamples()

    # Hooks, in the order in which they fire ---------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_callbacks(trainer, self)
        if stage == "fit":
            # A callback may serve several fits, and the previous one may have failed.
            self.teardown(trainer, pl_module, stage)
            self._companions = []
            self._metrics, self._histograms_before, self._bests, self._restored = {}, {}, {}, {}
            self.run_folder, self._audit, self._resumed, self._coverage_logged = None, None, False, False
            self.failed_exports, self._last_before = {}, None
            begin_run(trainer)
        fresh = attach_module(trainer, pl_module, self.config)
        self._asked = RequestedSettings(pl_module)
        self._layers = set(quantizable_layers(pl_module))
        if self.quantize_from > 0 and (stage == "fit" or fresh):
            # A checkpoint that is restored later overwrites this.
            set_active(pl_module, False)
        if stage != "fit":
            self._let_evaluations_fit(pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._asked is not None:
            self._asked.compare(trainer, pl_module, checkpoint)
        self._restored = checkpoint.get(CHECKPOINT_KEY, {})
        self._resumed = True
        self._metrics = dict(self._restored.get("metrics", {}))
        self._last_before = self._restored.get("last_before")
        self._histograms_before = dict(self._restored.get("before", {}))
        self._bests = dict(self._restored.get("bests", {}))
        if trainer.state.fn == "fit":
            # Some strategies restore after on_fit_start, and the Tuner restores within it.
            restore_auxiliary(self._companions, self._restored.get("companions", []))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_unsharded(quantizers(pl_module))
        check_layers(pl_module, self._layers)
        self._run_samples.begin(pl_module, self.samples)
        self._audited = not auditable(pl_module)
        # Here the callback does what the module's hooks do in a user's training loop.
        forget_first_forwards(pl_module)
        saved = self._restored.get("companions", [])
        self._companions, self._other_hooks = train_quantizers(trainer, pl_module, self.lr_factor, saved)
        self._quantizers = [q for _, q in quantizers(pl_module)]
        check_learners(trainer, sum(q.learns_bits for q in self._quantizers))
        self._run_samples.listen()
        self._begin_calibration(trainer, pl_module)
        self._run_samples.pause()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run_samples.listen()
        super().on_sanity_check_start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run_samples.listen()
        self._calibrate(trainer, pl_module)
        begin_training(trainer)
        self._first_step = trainer.global_step
        # The resumed run stored the execution order in its first batch, so the coverage can be logged now.
        self._execution_order_known = self._resumed and any(q.execution_index for q in self._quantizers)
        quiet = not (self.levels_file or self.export) or getattr(trainer, "fast_dev_run", False)
        self.run_folder = None if quiet else run_folder(trainer)
        if self.run_folder is not None:
            self._run_samples.foresee(trainer, pl_module, self.export)
        self.start_step = quantization_start(trainer)
        length = run_length(trainer) if self.quantize_from else math.inf
        self._never_begins = self.start_step >= length
        if self.quantize_from == 1.0 and isinstance(self.quantize_from, float):
            rank_zero_info("quantize_from=1.0: the whole run is in full precision, as a baseline for other runs.")
        elif self._never_begins:
            rank_zero_warn(
                f"quantize_from={self.quantize_from} is step {self.start_step} of a run of {length} steps: the run "
                "ends in full precision. Give an earlier step or fraction."
            )
        warn_of_restarted_data(trainer)
        if self._audited:
            self._log_coverage(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if any(q.has_gates for q in self._quantizers):
            # Forwards within a batch count up from this number, and so do the batches of one gradient accumulation. It
            # depends on the step alone, so a resumed run draws the same noise.
            set_noise_step(pl_module, run_step(trainer) << 16)
        if run_step(trainer) >= self.start_step and not all(q.active for q in self._quantizers):
            self._begin_quantization(trainer, pl_module)
        if not self._histograms_before and all(q.active for q in self._quantizers):
            self._histograms_before = weight_histograms(pl_module)
        self._track(trainer, pl_module)
        if not self._audited and self._audit is None:
            self._audit = Audit(pl_module)
            self._audit.__enter__()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        # With manual optimization, a step may run another forward after its first backward.
        if pl_module.automatic_optimization and self._audit is not None:
            self._audit.__exit__(None, None, None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._finish_audit(pl_module)
        if trainer.global_step == self._first_step + _STEPS_UNTIL_WARNING:
            warn_of_left_out(self._companions, trainer.optimizers)
        self._renew_ranges(trainer, pl_module)
        self._run_samples.leave(trainer, self.run_folder, self.export)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.on_test_batch_start(trainer)
        if batch_idx or dataloader_idx:
            return
        # Recording runs compiled code eagerly, which the audit needs too: traced, it would see no quantized tensor.
        eager = torch.compiler.set_stance("force_eager") if trainer.sanity_checking else recording(pl_module)
        eager.__enter__()
        self._recording = eager
        if self._audits_evaluation and auditable(pl_module):
            self._evaluation_audit = Audit(pl_module)
            self._evaluation_audit.__enter__()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        audit, self._evaluation_audit = self._evaluation_audit, None
        if audit is not None:
            self._audits_evaluation = False
            audit.__exit__(None, None, None)
            self._evaluated = audit.report
            if trainer.is_global_zero:
                report_audit(pl_module, audit.report, evaluation=True)
        self._stop_recording()
        self.on_test_batch_end(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_validation(trainer)
        self._take_back_ranges()
        if self._evaluated is not None:
            # Only now: _take_back_ranges resets the state of the quantizers.
            record_uncalled(pl_module, self._evaluated)
            self._evaluated = None

    def _end_validation(self, trainer: Trainer) -> None:
        pl_module = trainer.lightning_module
        if trainer.sanity_checking:
            return
        if trainer.state.fn == "fit":
            self._log_clipped(trainer, pl_module)
        quantized = all(q.active for _, q in quantizers(pl_module))
        self._metrics[QUANTIZED if quantized else BEFORE] = validation_metrics(trainer)
        if not quantized:
            self._last_before = run_step(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        share_with_averages(trainer, pl_module)
        correct_loader_states(trainer, checkpoint)
        config = attached_config(pl_module)
        checkpoint[CHECKPOINT_KEY] = {
            "config": None if config is None else config.to_dict(),
            "metrics": self._metrics,
            "last_before": self._last_before,
            # Relative, because a run without a logger may be moved along with its checkpoints.
            "folder": None if self.run_folder is None else f"{self.run_folder.parent.name}/{self.run_folder.name}",
            "before": self._histograms_before,
            "bests": self._bests,
            "companions": [auxiliary.state_dict() for auxiliary in self._companions],
        }

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        share_with_averages(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keep_zeros(trainer, pl_module)
        share_with_averages(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The module's own hooks may have pruned weights since on_train_end.
        self._keep_zeros(trainer, pl_module)
        warn_of_old_bests(trainer, self._bests, "quantization had begun: it is in full precision")
        if not self._never_begins and self._quantizers and not any(q.active for q in self._quantizers):
            rank_zero_warn(
                f"The run has ended at step {run_step(trainer)}, before quantization was to begin at step "
                f"{self.start_step}: the module is in full precision."
            )
        logged = sorted({name for metrics in self._metrics.values() for name in metrics})
        if self.monitor is not None and self._metrics and monitored_metric(trainer, logged) is None:
            rank_zero_warn(
                f"monitor={self.monitor!r} names no metric of this run's validation, which logged {logged}: reports do "
                "not compare this run with others."
            )
        if not (self.table or self.run_folder):
            return
        try:
            # On all ranks: each rank holds a part of sharded weights.
            if self.export:
                # Weights may have outgrown their ranges in the last steps, and an export would refuse that.
                refit_rewritten(pl_module)
            content = run_manifest(trainer, pl_module, self._metrics, self._last_before)
            for warning in (*full_precision_messages(pl_module), *range_warnings(pl_module)):
                rank_zero_warn(warning)
            after = weight_histograms(pl_module) if self.run_folder else {}
        except Exception as error:
            rank_zero_warn(
                f"Levels could not be collected ({type(error).__name__}: {error}). {what_is_saved(last_saved(trainer))}"
            )
            return
        if not trainer.is_global_zero:
            return
        folder = self.run_folder
        levels_file = None if folder is None or self.levels_file is None else folder / self.levels_file
        write_run_report(trainer, content, levels_file, self._histograms_before, after, self.table)
        if folder is None or not self.export:
            return
        exports = export_at_fit_end(pl_module, self.export, folder, last_saved(trainer))
        self.failed_exports = {result["format"]: result["error"] for result in exports if "error" in result}
        if levels_file is not None:
            record_exports(content, levels_file, exports)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._take_back_ranges()
        self._forbid_evaluations_to_fit()
        self._stop_tracking()
        self._stop_recording()
        # Lightning does not call on_train_batch_end for a batch that another callback has skipped.
        self._stop_audits()
        forget_configured(pl_module)
        self._run_samples.end()
        # Keep the auxiliary optimizers: a checkpoint may be saved after the fit.
        for hooked in (*self._companions, *self._other_hooks):
            hooked.remove()

    # Implementation ---------------------------------------------------------------------------------------------------

    def _begin_quantization(self, trainer: Trainer, pl_module: LightningModule) -> None:
        set_active(pl_module, True)
        refit(pl_module)
        self._bests = monitored_bests(trainer)
        share_with_averages(trainer, pl_module, dict(quantizers(pl_module)))
        for auxiliary in self._companions:
            # The momentum belongs to the scales before the refit.
            auxiliary.optimizer.state.clear()
        rank_zero_info(f"Quantization begins at step {run_step(trainer)}: all ranges are fitted again.")

    def _log_clipped(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log to the loggers directly: metric tables, progress bars and monitors keep to the user's metrics."""
        shares = clipped_shares(pl_module)
        if not shares or self.levels_file is None or not trainer.loggers:
            return
        means = torch.tensor(list(shares.values()), device=pl_module.device)
        means = trainer.strategy.reduce(means, reduce_op="mean").tolist()
        for logger in trainer.loggers:
            named = {f"cpq/clipped_{kind}": share for kind, share in zip(shares, means, strict=True)}
            logger.log_metrics(named, step=private.logged_step(trainer))

    def _finish_audit(self, pl_module: LightningModule) -> None:
        """Apply and report the audit of the first training batch, after its backward."""
        if self._audit is None:
            return
        audit, self._audit, self._audited = self._audit, None, True
        audit.__exit__(None, None, None)
        if self._execution_order_known:
            remember_products(pl_module, audit.report)
        else:
            report = broadcast_report(audit.report)
            settle_first_and_last(pl_module, report.execution_order)
            record_forward(pl_module, report)
            if pl_module.trainer.is_global_zero:
                report_audit(pl_module, report)
        self._log_coverage(pl_module)

    def _log_coverage(self, pl_module: LightningModule) -> None:
        """Log the coverage once per fit, as soon as a forward has determined it."""
        coverage = None if self._coverage_logged else recorded_coverage(pl_module, once_active=True)
        if coverage is not None:
            self._coverage_logged = True
            from_start = f"run quantized from step {self.start_step} on" if self.start_step else "run quantized"
            predicate = "would run quantized" if self._never_begins else from_start
            rank_zero_info(f"Coverage: {coverage.sentence(predicate)}.")

    def _stop_audits(self) -> None:
        for audit in (self._audit, self._evaluation_audit):
            if audit is not None:
                audit.__exit__(None, None, None)
        self._audit = self._evaluation_audit = None

    def _stop_recording(self) -> None:
        if self._recording is not None:
            self._recording.__exit__(None, None, None)
            self._recording = None


def _loads_from_spawned_processes(module: nn.Module) -> bool:
    """Whether a Trainer with a CPQCallback is loading into a module the weights that its spawned processes trained.

    The main process waits for the spawned ones: no callback hook runs in it, and the module has no Trainer there. So
    the Trainer is looked up in the frame of the Lightning method that loads the weights; this private method has the
    same name in both Lightning packages.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "_recover_results_in_main_process":
        frame = frame.f_back
    trainer = None if frame is None else frame.f_locals.get("trainer")
    return any(isinstance(callback, CPQCallback) for callback in getattr(trainer, "callbacks", ()))


attach_where(_loads_from_spawned_processes)
