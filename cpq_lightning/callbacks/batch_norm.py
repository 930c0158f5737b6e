"""BatchNormReestimation: estimates the running statistics of batch norms again for the final network of a fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from cpq_lightning.attach.calls import modes_restored
from cpq_lightning.bitwidth.model_cost import learning_quantizers
from cpq_lightning.trainer import private
from cpq_lightning.trainer.batches import keep_training_batches, training_batches
from cpq_lightning.trainer.calibration import forward_training_step, late_progress, without_effects
from cpq_lightning.trainer.checkpoint_patch import renew, saved_checkpoints
from cpq_lightning.trainer.checks import last_saved
from cpq_lightning.trainer.lightning_names import Callback, MisconfigurationException, is_a

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# Callbacks that change the network in validation or at the end of training; by name, for both Lightning packages.
_BEFORE = ("CPQCallback", "BitBudget", "WeightAveraging", "StochasticWeightAveraging")


class BatchNormReestimation(Callback):
    """Estimate the running statistics of batch norms again at the end of a fit, for the network in evaluation mode.

    Running means and variances are moving averages over earlier states of the network: other weights and ranges, and
    gates sampled by DropBits. This callback replaces them by plain averages over training batches. The batches run
    through ``training_step`` with only the batch norms in training mode (so widths are fixed, without DropBits or
    dropout). As in ``torch.optim.swa_utils.update_bn``, every batch has the same weight, and the variance between the
    means of the batches is ignored. Several processes average over the batches of all processes, and
    ``num_batches_tracked`` counts all of them. If an averaging callback such as ``EMAWeightAveraging`` evaluates
    averaged weights, the statistics are those of the averaged network.

    The estimation runs right before the last validation, so metrics and checkpoints have the new statistics, if that
    validation is known to be the last (``max_epochs``, ``max_steps``, ``max_time``). Otherwise it runs when training
    ends (early stopping, no validation, or widths that BitBudget fixes only then). A checkpoint that ModelCheckpoint
    has saved of the last step by then gets the new statistics, and no other change. Checkpoints that a metric has
    selected keep the statistics that the metric was measured with, and so do all checkpoints of earlier steps.

    The batches are those of another epoch. Reading them does not change the state of any loader or sampler. Streams,
    and loaders that are not PyTorch's, cannot be read without side effects: for these, the callback keeps copies of the
    last training batches in host memory.

    Batch norms that do not train (in evaluation mode, or frozen by a finetuning callback) keep their statistics, and so
    do batch norms that no batch reaches. If a step fails, all batch norms keep their statistics, the callback warns,
    and the run continues.

    Args:
        batches: Number of training batches to average over; at most one epoch.

    Raises:
        ValueError: ``batches`` is below 1.
        MisconfigurationException: a CPQCallback, a BitBudget or an averaging callback is listed after this callback.

    Example:
        >>> BatchNormReestimation().batches
        50
    """

    def __init__(self, batches: int = 50) -> None:
        if batches < 1:
            raise ValueError(f"batches must be at least 1, got {batches}.")
        self.batches = batches
        self._reset()

    def _reset(self) -> None:
        # Number of training batches done when the statistics were last estimated.
        self._estimated_at: int | None = None
        self._names: set[str] = set()
        # Checkpoints of the same weights that were written before the estimation.
        self._outdated: list[str] = []

    # Hooks, in the order in which they fire ---------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            _check_order(trainer, self)
            self._reset()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not any(isinstance(module, _BatchNorm) for module in pl_module.modules()):
            rank_zero_warn(
                f"BatchNormReestimation found no batch norm in {type(pl_module).__name__}, and does nothing: remove it."
            )
        else:
            keep_training_batches(trainer, self.batches)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The Trainer may have reloaded the loaders.
        if any(isinstance(module, _BatchNorm) for module in pl_module.modules()):
            keep_training_batches(trainer, self.batches)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in on_validation_start: averaging callbacks swap their weights in here.
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if _run_ends_here(trainer) and not learning_quantizers(pl_module):
            self._estimate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._estimated_at != trainer.fit_loop.total_batch_idx:
            if not self._estimate(trainer, pl_module):
                return
            _share_with_averages(trainer, pl_module, self._names)
            saved = last_saved(trainer)
            if saved and not self._outdated:
                rank_zero_warn(
                    "The statistics of batch norms were estimated again when training ended, and no checkpoint of this "
                    f"run has them (the last one is {saved}): trainer.save_checkpoint(path) writes one."
                )
        if self._outdated:
            # On all ranks: each rank holds a part of sharded weights.
            state = trainer.strategy.lightning_module_state_dict()
            for path in self._outdated if trainer.is_global_zero else ():
                renew(trainer, path, state, self._names)
            trainer.strategy.barrier("BatchNormReestimation")

    # Implementation ---------------------------------------------------------------------------------------------------

    def _estimate(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Estimate the statistics of all batch norms that train; return whether they have changed."""
        self._estimated_at, self._outdated = trainer.fit_loop.total_batch_idx, []
        with isolate_rng(), _as_in_training(trainer, pl_module):
            norms = [module for module in pl_module.modules() if _trains(module)]
            if not norms:
                return False
            saved = [[(value, value.clone()) for value in _statistics(norm)] for norm in norms]
            done = False
            try:
                done = self._average(trainer, pl_module, norms)
            finally:
                for norm, values in zip(norms, saved, strict=True):
                    # A batch norm that no batch has reached has no average.
                    if not done or not norm.num_batches_tracked:
                        for value, old in values:
                            value.copy_(old)
            named_modules = pl_module.named_modules(remove_duplicate=False)
            self._names = {
                f"{name}.{value}" for name, module in named_modules if module in norms for value in _STATISTICS
            }
        if done:
            self._outdated = saved_checkpoints(trainer)
            rank_zero_info(f"The statistics of {len(norms)} batch norms were estimated again, on training batches.")
        return done

    def _average(self, trainer: Trainer, pl_module: LightningModule, norms: Sequence[Any]) -> bool:
        error: Exception | None = None
        try:
            self._forward(trainer, pl_module, norms)
        except Exception as caught:
            error = caught
        if trainer.strategy.reduce_boolean_decision(error is None):
            if trainer.world_size > 1:
                _average_over_ranks(trainer, norms)
            if all(bool(value.isfinite().all()) for norm in norms for value in _statistics(norm)):
                return True
            error = ValueError("averages are not finite")
        reason = "in another process" if error is None else f"{type(error).__name__}: {error}"
        rank_zero_warn(
            f"The statistics of batch norms could not be estimated again ({reason}): they stay the moving averages of "
            "training."
        )
        return False

    def _forward(self, trainer: Trainer, pl_module: LightningModule, norms: Sequence[Any]) -> None:
        limit = min(self.batches, trainer.num_training_batches)
        bar = trainer.progress_bar_callback
        # Older versions of rich show one bar at a time.
        rich = is_a(bar, "RichProgressBar")
        shown = trainer.is_global_zero and bar is not None and not rich
        # Run compiled code eagerly: it would be compiled again in these modes for only a few batches.
        eager: Any = torch.compiler.set_stance("force_eager")
        with late_progress("Estimating batch norms", int(limit), shown) as advance, eager, torch.no_grad():
            with _averaging(pl_module, norms), without_effects(trainer):
                seen = 0
                for batch in training_batches(trainer, int(limit)):
                    with _evaluating(pl_module, norms):
                        forward_training_step(trainer, batch)
                    seen += 1
                    advance()
        if not seen:
            raise ValueError("the training data gave no batch")


def _check_order(trainer: Trainer, reestimation: Callback) -> None:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks[callbacks.index(reestimation) + 1 :]:
        if is_a(callback, *_BEFORE):
            raise MisconfigurationException(
                f"{type(callback).__name__} stands behind BatchNormReestimation, which needs the network after its "
                "changes: put BatchNormReestimation last in the list of callbacks. (A QuantizedModule adds a "
                "CPQCallback at the end of a list that has none: put one first.)"
            )


def _run_ends_here(trainer: Trainer) -> bool:
    """Whether no training batch follows the validation that is starting, as far as Lightning knows."""
    loop = trainer.fit_loop
    if trainer.should_stop and private.can_stop_early(trainer):
        return True
    if loop.max_steps != -1 and trainer.global_step >= loop.max_steps:
        return True
    # Lightning counts an epoch as processed only after its validation.
    epochs, max_epochs = loop.epoch_progress.current.processed + 1, loop.max_epochs  # type: ignore[attr-defined]
    return (
        max_epochs is not None
        and max_epochs != -1
        and epochs >= max_epochs
        and private.is_last_training_batch_done(trainer)
    )


@contextmanager
def _as_in_training(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Set the stage and modes of training, also within a validation: batch augmentations read them."""
    stage = trainer.state.stage
    with modes_restored(module):
        if trainer.validating:
            private.restore_training_mode(trainer, module)
        trainer.training = True
        try:
            yield
        finally:
            trainer.state.stage = stage


@contextmanager
def _averaging(module: LightningModule, norms: Sequence[Any]) -> Iterator[None]:
    """Let batch norms compute plain averages over their inputs; restore all other buffers afterwards."""
    statistics = {id(value) for norm in norms for value in _statistics(norm)}
    other_buffers = [(value, value.detach().clone()) for value in module.buffers() if id(value) not in statistics]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for value, saved in other_buffers:
            value.copy_(saved)


@contextmanager
def _evaluating(module: nn.Module, norms: Sequence[Any]) -> Iterator[None]:
    """Put the network into evaluation mode, except for these batch norms."""
    with modes_restored(module):
        module.eval()
        for norm in norms:
            # Not by train(): batch norms of timm contain activations and dropout.
            norm.training = True
        yield


def _trains(module: nn.Module) -> bool:
    """Whether a module is a batch norm that updates its running statistics."""
    if not isinstance(module, _BatchNorm) or not (module.training and module.track_running_stats):
        return False
    return all(value is not None and not is_lazy(value) for value in _statistics(module))


def _statistics(norm: Any) -> list[Tensor]:
    return [getattr(norm, name) for name in _STATISTICS]


def _average_over_ranks(trainer: Trainer, norms: Sequence[Any]) -> None:
    """Average means and variances over the batches of all ranks, whose numbers of batches may differ."""
    for norm in norms:
        count = norm.num_batches_tracked.double()
        total = trainer.strategy.reduce(count.clone(), reduce_op="sum")
        for value in (norm.running_mean, norm.running_var):
            value.copy_(trainer.strategy.reduce(count * value, reduce_op="sum") / total.clamp(min=1))
        norm.num_batches_tracked.copy_(total)


def _share_with_averages(trainer: Trainer, pl_module: LightningModule, names: set[str]) -> None:
    """Copy the statistics into the models of averaging callbacks, which checkpoints after the fit are saved from."""
    buffers = dict(pl_module.named_buffers(remove_duplicate=False))
    for average in private.averaged_models(trainer):
        copies = dict(average.named_buffers(remove_duplicate=False))
        for name in names & copies.keys():
            copies[name].copy_(buffers[name])
