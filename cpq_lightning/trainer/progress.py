"""Properties of a run: its current step, its length, and its folder."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from lightning.pytorch.utilities import rank_zero_warn

from cpq_lightning.trainer import private
from cpq_lightning.trainer.lightning_names import PACKAGES

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def run_step(trainer: Trainer) -> int:
    """Number of optimizer steps done; with manual optimization, number of batches, however many optimizers step."""
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]


def run_length(trainer: Trainer) -> float:
    """Length of the run in steps as :func:`run_step` counts them; ``inf`` if unknown.

    Call it from ``on_train_start`` on. An earlier call would set up the data before a resumed run restores the state of
    its loaders, and the loaders would then start from the beginning.
    """
    steps = trainer.estimated_stepping_batches
    return math.inf if steps < 0 else steps


def warn_of_restarted_data(trainer: Trainer) -> None:
    """Warn if a resumed run continues in the middle of an epoch with a loader that cannot; call it when training
    starts.
    """
    loop = trainer.fit_loop
    if not loop.restarted_mid_epoch or loop.epoch_loop.batch_progress.is_last_batch:
        return
    loader = private.training_loader(trainer)
    loaders = [] if loader is None else loader.flattened
    if all(hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict") for loader in loaders):
        return
    rank_zero_warn(
        f"The run goes on in the middle of epoch {trainer.current_epoch}, with a loader that starts over at its first "
        "batch. Schedules, the noise of DropBits and the path of a budget continue exactly, since they depend on the "
        "step alone. But the rest of this epoch sees other batches than an uninterrupted run, so weights, scales and "
        "widths will differ. "
        "Resume from the end of an epoch, or with a loader that has state_dict and load_state_dict (torchdata's "
        "StatefulDataLoader), to end bit for bit the same."
    )


# Parent folder of runs whose logger has no folder.
RUNS = "cpq_runs"
_folders: WeakKeyDictionary[Trainer, Path] = WeakKeyDictionary()


def run_folder(trainer: Trainer) -> Path:
    """The folder of the run; call it on all ranks at once.

    This is the folder of the first logger, if that has one for each run. Otherwise it is the next of
    ``cpq_runs/version_0``, ``version_1``, … in the Trainer's ``default_root_dir``, created by the first call in a fit.
    """
    if trainer not in _folders:
        _folders[trainer] = _logged_folder(trainer) or Path(
            trainer.strategy.broadcast(str(_new_folder(trainer)) if trainer.is_global_zero else "")
        )
    return _folders[trainer]


def begin_run(trainer: Trainer) -> None:
    """Start a new run, so that :func:`run_folder` returns a new folder; call it before a fit."""
    _folders.pop(trainer, None)


def _logged_folder(trainer: Trainer) -> Path | None:
    """The parent of the folder in which Lightning stores a run's checkpoints."""
    if not trainer.loggers:
        return None
    logger = trainer.loggers[0]
    log_dir = getattr(logger, "log_dir", None)
    if isinstance(log_dir, str | Path):
        return Path(trainer.strategy.broadcast(str(log_dir)))
    if logger.version is None:
        return None
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    folder = Path(logger.save_dir or trainer.default_root_dir, str(logger.name), version)
    return Path(trainer.strategy.broadcast(str(folder)))


def _new_folder(trainer: Trainer) -> Path:
    runs = Path(trainer.default_root_dir) / RUNS
    numbers = [int(p.name[8:]) for p in runs.glob("version_*") if p.name[8:].isdigit()]
    for number in itertools.count(max(numbers, default=-1) + 1):
        folder = runs / f"version_{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            # Another run has just created it.
            continue
        except OSError:
            # Writing to the folder will fail with a warning; training continues.
            pass
        return folder
    raise AssertionError


def overrides(module: object, method: str) -> bool:
    """Whether a LightningModule (of ``lightning`` or ``pytorch_lightning``) overrides a method."""
    owner = next((cls for cls in type(module).__mro__ if method in cls.__dict__), None)
    return owner is not None and owner.__module__.split(".")[0] not in PACKAGES
