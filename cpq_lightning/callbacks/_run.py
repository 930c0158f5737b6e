"""What callbacks ask of a Trainer: where the run is, how long it is, and one forward of somebody's training step."""

from __future__ import annotations

import copy
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from rich.progress import Progress
from torch import nn
from torchmetrics import Metric

from cpq_lightning.attach import quantizers
from cpq_lightning.nn import Quantizer

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def run_step(trainer: Trainer) -> int:
    """The optimizer step that the run is at; under manual optimization the batch, however many optimizers step."""
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return trainer.fit_loop.epoch_loop.total_batch_idx


def run_length(trainer: Trainer) -> float:
    """Steps of the whole run as :func:`run_step` counts them, ``inf`` where unknown."""
    steps = trainer.estimated_stepping_batches
    return math.inf if steps < 0 else steps


def run_folder(trainer: Trainer) -> Path:
    """The run's folder; asked for on all ranks at once."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def overrides(module: object, method: str) -> bool:
    """Whether a LightningModule defines a hook itself; of either package, ``lightning`` or ``pytorch_lightning``."""
    owner = next((cls for cls in type(module).__mro__ if method in cls.__dict__), None)
    return owner is not None and owner.__module__.split(".")[0] not in ("lightning", "pytorch_lightning")


def training_batches(trainer: Trainer, most: int) -> list[Any] | None:
    """The first batches of the training data, on the device, as the training loop would hand them over.

    They are drawn in a random state of their own, and the training loop's iterator starts again behind them.
    ``None`` where the run has no training data at all.
    """
    loop, module = trainer.fit_loop, trainer.lightning_module
    loop.setup_data()
    loader, fetcher = loop._combined_loader, loop._data_fetcher
    if loader is None or fetcher is None:
        return None
    batches = []
    with isolate_rng():
        for batch, _, dataloader_idx in islice(iter(copy.copy(loader)), most):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
            batches.append(trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx))
    iter(fetcher)
    return batches


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
    own = {id(p) for _, q in quantizers(module) for p in q.parameters()}
    # A teacher's weights may be moved by hand within a step.
    weights = [(p, p._version, p.detach().clone()) for p in module.parameters() if id(p) not in own]
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
            with torch.no_grad():
                for parameter, version, value in weights:
                    if parameter._version != version:
                        parameter.copy_(value)


_CONTAINERS = (list, dict, set, deque)


def _notes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """A module's attributes, containers with a copy of their content; torch's own have an underscore."""
    return {
        name: (value, copy.copy(value) if isinstance(value, _CONTAINERS) else None)
        for name, value in vars(module).items()
        if not name.startswith("_")
    }


def _restore_notes(module: nn.Module, notes: dict[str, tuple[Any, Any]]) -> None:
    attributes = cast(dict[str, Any], vars(module))
    for name in [n for n in attributes if not n.startswith("_") and n not in notes]:
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
        progress.stop()
