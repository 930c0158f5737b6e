"""What callbacks ask of a Trainer: where the run is, how long it is, and where it writes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

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
