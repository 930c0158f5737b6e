"""BatchNormReestimation: batch norms' running statistics, estimated again for the network that a fit ends with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from cpq_lightning.bitwidth.model_cost import learning_quantizers
from cpq_lightning.trainer.batches import keep_training_batches, training_batches
from cpq_lightning.trainer.calibration import forward_training_step, late_progress, without_effects
from cpq_lightning.trainer.checkpoint_patch import renew, saved_checkpoints
from cpq_lightning.trainer.checks import last_saved
from cpq_lightning.trainer.lightning_names import Callback, MisconfigurationException, is_a

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# What still changes the network when it is validated, or when training ends; by name, for either Lightning package.
_BEFORE = ("CPQCallback", "BitBudget", "WeightAveraging", "StochasticWeightAveraging")


class BatchNormReestimation(Callback):
    """Estimate batch norms' running statistics again at the end of a fit, for the network as it evaluates.

    Running means and variances are moving averages over networks that training has left behind: other weights and
    ranges, gates that DropBits has drawn. Here they become plain averages over training batches, which run through
    ``training_step`` with all in evaluation mode but the batch norms (fixed widths, no DropBits, no dropout). As in
    ``torch.optim.swa_utils.update_bn`` each batch counts the same, and the variance between batches' means is left out.
    Several processes average over the batches of all, and ``num_batches_tracked`` counts them. Where an averaging
    callback such as ``EMAWeightAveraging`` evaluates averaged weights, the statistics are those of that network.

    It is done right before the last validation where that is known to be the last (``max_epochs``, ``max_steps``,
    ``max_time``), so that metrics and checkpoints have it; else when training ends (early stopping, no validation,
    widths that BitBudget fixes only then). What ModelCheckpoint had saved of the last step by then gets the new
    statistics, and no other change, unless a metric has chosen it: that one holds what was measured, and so do all
    checkpoints of earlier steps.

    The batches are those of another epoch, read without moving any loader or sampler on. A stream, and a loader that is
    not PyTorch's, gives none without a trace: of these the last batches of training are kept in memory, on the host.

    Batch norms that do not train (in evaluation mode, or frozen by a finetuning callback) keep their statistics, and so
    do those that no batch reaches. Where a step fails all keep them, a warning says so, and the run goes on.

    Args:
        batches: Training batches to average over; an epoch's where it has fewer.

    Raises:
        ValueError: ``batches`` below 1.
        MisconfigurationException: a CPQCallback, a BitBudget or an averaging callback behind this one.

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
        # The training batch behind which statistics were last estimated.
        self._estimated_at: int | None = None
        self._names: set[str] = set()
        # Checkpoints of the same weights that were written before that.
        self._outdated: list[str] = []

    # Hooks, in the order in which they fire ---------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            _check_order(trainer, self)
            self._reset()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not any(isinstance(module, _BatchNorm) for module in pl_module.modules()):
            rank_zero_warn(
                f"BatchNormReestimation found no batch norm in {type(pl_module).__name__}, and does nothing: leave it "
                "out."
            )
        else:
            keep_training_batches(trainer, self.batches)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Loaders may have been made anew.
        if any(isinstance(module, _BatchNorm) for module in pl_module.modules()):
            keep_training_batches(trainer, self.batches)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in on_validation_start: averaging callbacks put their weights in place in this hook.
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
                    "Batch norms' statistics were estimated again when training ended, and no checkpoint of this run "
                    f"has them, {saved} neither: trainer.save_checkpoint(path) makes one."
                )
        if self._outdated:
            # On all ranks: where weights are sharded each holds a part.
            state = trainer.strategy.lightning_module_state_dict()
            for path in self._outdated if trainer.is_global_zero else ():
                renew(trainer, path, state, self._names)
            trainer.strategy.barrier("BatchNormReestimation")

    # Steps of the work ------------------------------------------------------------------------------------------------

    def _estimate(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Estimate the statistics of all batch norms that train; whether it was done."""
        self._estimated_at, self._outdated = trainer.fit_loop.total_batch_idx, []
        with isolate_rng(), _as_in_training(trainer, pl_module):
            norms = [module for module in pl_module.modules() if _trains(module)]
            if not norms:
                return False
            kept = [[(value, value.clone()) for value in _statistics(norm)] for norm in norms]
            done = False
            try:
                done = self._average(trainer, pl_module, norms)
            finally:
                for norm, values in zip(norms, kept, strict=True):
                    # What no batch has reached has nothing to average.
                    if not done or not norm.num_batches_tracked:
                        for value, before in values:
                            value.copy_(before)
            named = pl_module.named_modules(remove_duplicate=False)
            self._names = {f"{name}.{value}" for name, module in named if module in norms for value in _STATISTICS}
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
            f"Batch norms' statistics could not be estimated again ({reason}): they stay the moving averages that "
            "training has left."
        )
        return False

    def _forward(self, trainer: Trainer, pl_module: LightningModule, norms: Sequence[Any]) -> None:
        most = min(self.batches, trainer.num_training_batches)
        bar = trainer.progress_bar_callback
        # Older versions of rich show one bar at a time.
        rich = is_a(bar, "RichProgressBar")
        shown = trainer.is_global_zero and bar is not None and not rich
        # Compiled code runs as it was written: it would be compiled anew for a few batches in modes of their own.
        eager: Any = torch.compiler.set_stance("force_eager")
        try:
            with late_progress("Estimating batch norms", int(most), shown) as advance, eager, torch.no_grad():
                with _averaging(pl_module, norms), without_effects(trainer):
                    seen = 0
                    for batch in training_batches(trainer, int(most)):
                        with _evaluating(pl_module, norms):
                            forward_training_step(trainer, batch)
                        seen += 1
                        advance()
            if not seen:
                raise ValueError("the training data gave no batch")
        finally:
            for module in pl_module.modules():
                # A forward leaves FSDP2's root whole until a backward.
                if isinstance(module, FSDPModule):
                    module.reshard()


def _check_order(trainer: Trainer, own: Callback) -> None:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks[callbacks.index(own) + 1 :]:
        if is_a(callback, *_BEFORE):
            raise MisconfigurationException(
                f"{type(callback).__name__} stands behind BatchNormReestimation, which needs the network that it "
                "leaves: put BatchNormReestimation last in the list of callbacks. (A QuantizedModule adds a "
                "CPQCallback at the end where the list has none: put one first.)"
            )


def _run_ends_here(trainer: Trainer) -> bool:
    """Whether no training batch follows the validation that begins, as far as Lightning knows by now."""
    loop = trainer.fit_loop
    if trainer.should_stop and loop._can_stop_early:
        return True
    if loop.max_steps != -1 and trainer.global_step >= loop.max_steps:
        return True
    # An epoch counts as processed behind its validation.
    epochs, most = loop.epoch_progress.current.processed + 1, loop.max_epochs  # type: ignore[attr-defined]
    return most is not None and most != -1 and epochs >= most and loop.epoch_loop._num_ready_batches_reached()


@contextmanager
def _as_in_training(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """The stage and the modes of training, also within a validation: augmentations of batches ask for them."""
    stage, modes = trainer.state.stage, [(m, m.training) for m in module.modules()]
    if trainer.validating:
        trainer.fit_loop.epoch_loop.val_loop._module_mode.restore(module)
    trainer.training = True
    try:
        yield
    finally:
        trainer.state.stage = stage
        for m, training in modes:
            m.training = training


@contextmanager
def _averaging(module: LightningModule, norms: Sequence[Any]) -> Iterator[None]:
    """Batch norms that average what they see; of buffers only their statistics change."""
    own = {id(value) for norm in norms for value in _statistics(norm)}
    others = [(value, value.detach().clone()) for value in module.buffers() if id(value) not in own]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for value, before in others:
            value.copy_(before)


@contextmanager
def _evaluating(module: nn.Module, norms: Sequence[Any]) -> Iterator[None]:
    """A network that evaluates, but for these batch norms."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    for norm in norms:
        # Not by train(): timm's batch norms hold activations and dropout.
        norm.training = True
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def _trains(module: nn.Module) -> bool:
    """Whether a module is a batch norm that updates its statistics."""
    if not isinstance(module, _BatchNorm) or not (module.training and module.track_running_stats):
        return False
    return all(value is not None and not is_lazy(value) for value in _statistics(module))


def _statistics(norm: Any) -> list[Tensor]:
    return [getattr(norm, name) for name in _STATISTICS]


def _average_over_ranks(trainer: Trainer, norms: Sequence[Any]) -> None:
    """Average means and variances over the batches of all ranks, which need not be equally many."""
    for norm in norms:
        share = norm.num_batches_tracked.double()
        total = trainer.strategy.reduce(share.clone(), reduce_op="sum")
        for value in (norm.running_mean, norm.running_var):
            value.copy_(trainer.strategy.reduce(share * value, reduce_op="sum") / total.clamp(min=1))
        norm.num_batches_tracked.copy_(total)


def _share_with_averages(trainer: Trainer, pl_module: LightningModule, names: set[str]) -> None:
    """Give the copies that averaging callbacks keep the statistics: what is saved behind the fit is such a copy."""
    own = dict(pl_module.named_buffers(remove_duplicate=False))
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if average is not None:
            copies = dict(getattr(average, "module", average).named_buffers(remove_duplicate=False))
            for name in names & copies.keys():
                copies[name].copy_(own[name])
