"""Calibration of a LightningModule before training: runs its training step on batches, without side effects."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from rich.progress import Progress
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchmetrics import Metric

from cpq_lightning.attach.attach import set_active
from cpq_lightning.attach.calibrate import FailedElsewhere, calibrate
from cpq_lightning.attach.layers import quantizers
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.trainer import private
from cpq_lightning.trainer.batches import Item, copied, on_device, read_training_ahead
from cpq_lightning.trainer.lightning_names import MisconfigurationException, is_a

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def calibrate_for_training(trainer: Trainer, pl_module: LightningModule, max_batches: int) -> bool:
    """Calibrate on the first training batches by running ``training_step``; training still gets these batches.

    Args:
        trainer: A trainer whose fit has begun.
        pl_module: The attached module.
        max_batches: Maximal number of batches.

    Returns:
        Whether the calibration succeeded. If the run has no training data, the result is ``False``. If no batch can be
        read before training, or if ``training_step`` fails, the result is ``False`` too, after a warning, and the
        quantizers are inactive.

    Raises:
        MisconfigurationException: the calibration fails outside of ``training_step``.
    """
    items = read_training_ahead(trainer, max_batches)
    if items is None:
        return False
    takes_iterator = is_a(private.training_fetcher(trainer), "_DataLoaderIterDataFetcher")
    if trainer.strategy.reduce_boolean_decision(bool(items)):
        error = run_calibration(trainer, pl_module, items, lambda item, batch: forward_training_step(trainer, batch))
        if error is None:
            return True
        # The user's training_step may need state that the training loop has not set up yet. If the step is broken, it
        # fails again in training, with a traceback free of calibration code.
        reason = f"training_step failed there with {type(error).__name__}: {error}"
    elif takes_iterator:
        reason = "training_step takes the data's iterator"
    else:
        empty = not trainer.strategy.reduce_boolean_decision(bool(items), all=False)
        reason = "the training data have no batch" if empty else "a process has no batch"
    rank_zero_warn(
        f"Activation ranges could not be calibrated before training, because {reason}. The sanity check runs in full "
        "precision, and the first training batch sets the ranges."
    )
    set_active(pl_module, False)
    return False


def run_calibration(
    trainer: Trainer, pl_module: LightningModule, items: Sequence[Item], step: Callable[[Item, Any], Any]
) -> Exception | None:
    """Calibrate on batches of a loader, without changing the batches.

    Args:
        trainer: The module's trainer.
        pl_module: The attached module.
        items: The batches.
        step: Runs a forward, given an item of the loader and a copy of its batch on the device.

    Returns:
        The exception of a step or of a hook that prepares batches; ``None`` on success.

    Raises:
        MisconfigurationException: the calibration fails outside of the steps and hooks.
    """
    failed: list[Exception] = []
    prepared: dict[int, Any] = {}
    shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
    with late_progress("Calibrating activation ranges", 2 * len(items), shown) as advance:

        def forward(index: int) -> None:
            try:
                if index not in prepared:
                    prepared[index] = on_device(trainer, copied(items[index]))
                step(items[index], copied(prepared[index]))
            except Exception as error:
                failed.append(error)
                raise
            advance()

        try:
            with isolate_rng(), without_effects(trainer):
                calibrate(pl_module, range(len(items)), forward=forward, max_batches=len(items))
        except Exception as error:
            if isinstance(error, FailedElsewhere):
                failed.append(error)
            if not failed:
                raise MisconfigurationException(f"CPQCallback cannot calibrate: {error}") from error
        finally:
            for module in pl_module.modules():
                # FSDP2 keeps the root unsharded after a forward until a backward; checkpoints are restored into shards.
                if isinstance(module, FSDPModule):
                    module.reshard()
    return failed[0] if failed else None


def lacks_ranges(quantizers: Sequence[Quantizer], resumed: bool) -> bool:
    """Whether a range is missing that calibration can find, or a weight range still dates from attachment."""
    active = [q for q in quantizers if q.active]
    # In a resumed run, a quantizer without a range belongs to a layer that is never called: calibrating because of it
    # would fit all other ranges again.
    activations = [q for q in active if q.kind == "activation"]
    calibrated_before = resumed and any(q.settled for q in activations or active)
    return not calibrated_before and not all(q.fitted and q.settled for q in active)


def forward_training_step(trainer: Trainer, batch: Any) -> None:
    """Run ``training_step`` on a batch, with the run's precision; call it within :func:`without_effects`."""
    module = trainer.lightning_module
    with trainer.precision_plugin.train_step_context():
        # The same check as in the training loop: a step may take no index.
        indexed = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        module.training_step(batch, *([0] if indexed else []))


@contextmanager
def without_effects(trainer: Trainer) -> Iterator[None]:
    """Run training steps without side effects: no logs, no updates, and metrics and attributes are restored."""
    module = trainer.lightning_module
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    silenced: list[tuple[Any, tuple[str, ...]]] = [
        (module, ("log", "log_dict", "manual_backward", "clip_gradients", "toggle_optimizer", "untoggle_optimizer")),
        *((optimizer, ("step", "zero_grad")) for optimizer in private.optimizer_wrappers(trainer)),
        *((scheduler, ("step",)) for scheduler in schedulers),
    ]
    metrics = [(m, dict(m.__dict__), m._copy_state_dict()) for m in module.modules() if isinstance(m, Metric)]
    module_attributes = [(m, _attributes(m)) for m in module.modules() if not isinstance(m, Metric | Quantizer)]
    should_stop = trainer.should_stop
    quantizer_parameters = {id(p) for _, q in quantizers(module) for p in q.parameters()}
    # A step may update weights by hand, for example those of an EMA teacher.
    weights = [(p, p.detach().clone()) for p in module.parameters() if id(p) not in quantizer_parameters]
    with ExitStack() as stack:
        for owner, names in silenced:
            attributes = cast(dict[str, Any], vars(owner))
            stack.callback(attributes.update, {n: attributes[n] for n in names if n in attributes})
            for name in names:
                stack.callback(attributes.pop, name, None)
                attributes[name] = _do_nothing
        try:
            yield
        finally:
            for metric, metric_attributes, state in metrics:
                cast(dict[str, Any], vars(metric)).update(metric_attributes)
                for name, value in state.items():
                    setattr(metric, name, value)
            for owner, saved_attributes in module_attributes:
                _restore_attributes(owner, saved_attributes)
            trainer.should_stop = should_stop
            with torch.no_grad():
                for parameter, value in weights:
                    # Compare values: a write through ``.data`` does not change a tensor's version.
                    if not torch.equal(parameter, value):
                        parameter.copy_(value)


_CONTAINERS = (list, dict, set, deque)
# Attributes of every nn.Module: its tensors are restored elsewhere, and hooks may be removed through their handles.
_TORCH_ATTRIBUTES = frozenset(vars(nn.Module()))


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """A module's attributes, with a copy of each container's content."""
    return {
        name: (value, copy.copy(value) if isinstance(value, _CONTAINERS) else None)
        for name, value in vars(module).items()
        if _is_user_attribute(name)
    }


def _is_user_attribute(name: str) -> bool:
    return name not in _TORCH_ATTRIBUTES and not name.startswith("_cpq_")


def _restore_attributes(module: nn.Module, saved: dict[str, tuple[Any, Any]]) -> None:
    attributes = cast(dict[str, Any], vars(module))
    for name in [n for n in attributes if _is_user_attribute(n) and n not in saved]:
        del attributes[name]
    for name, (value, content) in saved.items():
        attributes[name] = value
        if content is not None:
            value.clear()
            value.extend(content) if isinstance(value, list | deque) else value.update(content)


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    return None


@contextmanager
def late_progress(description: str, total: int, shown: bool, delay: float = 1.0) -> Iterator[Callable[[], None]]:
    """Show a progress bar after ``delay`` seconds; yield a function that advances it by one."""
    progress = Progress(transient=True)
    task = progress.add_task(description, total=total)
    begun = time.monotonic()

    def advance() -> None:
        progress.advance(task)
        if shown and not progress.live.is_started and time.monotonic() - begun > delay:
            progress.start()

    try:
        yield advance
    finally:
        if progress.live.is_started:
            progress.stop()
