"""Calibration of a LightningModule before its training: forwards of its own training step, without a trace."""

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
from cpq_lightning.trainer.batches import Item, copied, on_device, read_training_ahead
from cpq_lightning.trainer.lightning_names import MisconfigurationException, is_a

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def calibrate_for_training(trainer: Trainer, pl_module: LightningModule, most: int) -> bool:
    """Calibrate on the first training batches, run through ``training_step``; training gets them all the same.

    Args:
        trainer: A trainer whose fit has begun.
        pl_module: The attached module.
        most: Batches.

    Returns:
        Whether it was done, or there was nothing to do it with. Where there is no batch to be had before training, or
        ``training_step`` fails there, the quantizers are inactive, and a warning has said so.

    Raises:
        MisconfigurationException: calibration itself fails.
    """
    items = read_training_ahead(trainer, most)
    if items is None:
        return False
    takes_iterator = is_a(trainer.fit_loop._data_fetcher, "_DataLoaderIterDataFetcher")
    if trainer.strategy.reduce_boolean_decision(bool(items)):
        error = run_calibration(trainer, pl_module, items, lambda item, batch: forward_training_step(trainer, batch))
        if error is None:
            return True
        # Somebody's training_step may rely on what the training loop has not set up yet. If it is truly broken, it
        # fails again in a moment, with nothing of ours around it.
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
    """Calibrate on batches as they come from a loader, which are left as they are.

    Args:
        trainer: The module's trainer.
        pl_module: The attached module.
        items: The batches.
        step: Runs one for its forward, given what came from the loader and a copy of it on the device.

    Returns:
        What a step, or a hook that prepares batches, failed with.

    Raises:
        MisconfigurationException: calibration itself fails.
    """
    failed: list[Exception] = []
    ready: dict[int, Any] = {}
    shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
    with late_progress("Calibrating activation ranges", 2 * len(items), shown) as advance:

        def forward(place: int) -> None:
            try:
                if place not in ready:
                    ready[place] = on_device(trainer, copied(items[place]))
                step(items[place], copied(ready[place]))
            except Exception as error:
                failed.append(error)
                raise
            advance()

        try:
            with isolate_rng(), without_effects(trainer):
                calibrate(pl_module, range(len(items)), forward=forward, most=len(items))
        except Exception as error:
            if isinstance(error, FailedElsewhere):
                failed.append(error)
            if not failed:
                raise MisconfigurationException(f"CPQCallback cannot calibrate: {error}") from error
        finally:
            for module in pl_module.modules():
                # A forward leaves FSDP2's root whole until a backward; a checkpoint is restored into its shards.
                if isinstance(module, FSDPModule):
                    module.reshard()
    return failed[0] if failed else None


def lacks_ranges(quantizers: Sequence[Quantizer], resumed: bool) -> bool:
    """Whether a range is missing that a calibration would find, or is still that of the weights at attachment."""
    active = [q for q in quantizers if q.active]
    # In a resumed run what still has no range belongs to a layer that is never called: to calibrate for its sake would
    # fit all others anew.
    activations = [q for q in active if q.kind == "activation"]
    seen = resumed and any(q.settled for q in activations or active)
    return not seen and not all(q.fitted and q.settled for q in active)


def forward_training_step(trainer: Trainer, batch: Any) -> None:
    """Run ``training_step`` on a batch for its forward, under the run's precision; within :func:`without_effects`."""
    module = trainer.lightning_module
    with trainer.precision_plugin.train_step_context():
        # The question that the training loop asks, for steps that take no index.
        indexed = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        module.training_step(batch, *([0] if indexed else []))


@contextmanager
def without_effects(trainer: Trainer) -> Iterator[None]:
    """Run somebody's training steps without a trace: no log, no update, no metric, no note in an attribute."""
    module = trainer.lightning_module
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    silenced: list[tuple[Any, tuple[str, ...]]] = [
        (module, ("log", "log_dict", "manual_backward", "clip_gradients", "toggle_optimizer", "untoggle_optimizer")),
        *((optimizer, ("step", "zero_grad")) for optimizer in trainer.strategy._lightning_optimizers),
        *((scheduler, ("step",)) for scheduler in schedulers),
    ]
    metrics = [(m, dict(m.__dict__), m._copy_state_dict()) for m in module.modules() if isinstance(m, Metric)]
    notes = [(m, _notes(m)) for m in module.modules() if not isinstance(m, Metric | Quantizer)]
    should_stop = trainer.should_stop
    own = {id(p) for _, q in quantizers(module) for p in q.parameters()}
    # A teacher's weights may be moved by hand within a step.
    weights = [(p, p.detach().clone()) for p in module.parameters() if id(p) not in own]
    with ExitStack() as stack:
        for owner, names in silenced:
            held = cast(dict[str, Any], vars(owner))
            stack.callback(held.update, {n: held[n] for n in names if n in held})
            for name in names:
                stack.callback(held.pop, name, None)
                held[name] = _nothing
        try:
            yield
        finally:
            for metric, attributes, state in metrics:
                cast(dict[str, Any], vars(metric)).update(attributes)
                for name, value in state.items():
                    setattr(metric, name, value)
            for owner, note in notes:
                _restore_notes(owner, note)
            trainer.should_stop = should_stop
            with torch.no_grad():
                for parameter, value in weights:
                    # By value: what is written through ``.data`` leaves a tensor's version as it was.
                    if not torch.equal(parameter, value):
                        parameter.copy_(value)


_CONTAINERS = (list, dict, set, deque)
# What every module has: its tensors are looked after elsewhere, and hooks may be removed by who has them.
_TORCH_S = frozenset(vars(nn.Module()))


def _notes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """A module's attributes, containers with a copy of their content."""
    return {
        name: (value, copy.copy(value) if isinstance(value, _CONTAINERS) else None)
        for name, value in vars(module).items()
        if _is_note(name)
    }


def _is_note(name: str) -> bool:
    return name not in _TORCH_S and not name.startswith("_cpq_")


def _restore_notes(module: nn.Module, notes: dict[str, tuple[Any, Any]]) -> None:
    attributes = cast(dict[str, Any], vars(module))
    for name in [n for n in attributes if _is_note(n) and n not in notes]:
        del attributes[name]
    for name, (value, content) in notes.items():
        attributes[name] = value
        if content is not None:
            value.clear()
            value.extend(content) if isinstance(value, list | deque) else value.update(content)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


@contextmanager
def late_progress(description: str, total: int, shown: bool, delay: float = 1.0) -> Iterator[Callable[[], None]]:
    """A progress bar that appears once ``delay`` seconds have passed; yields what advances it."""
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
