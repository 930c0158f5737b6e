"""What callbacks ask of a Trainer: where the run is, how long it is, and where it writes."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from lightning.pytorch.utilities import rank_zero_warn

from cpq_lightning.trainer.lightning_names import PACKAGES

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def run_step(trainer: Trainer) -> int:
    """Optimizer steps that are done; under manual optimization batches, however many optimizers step in one."""
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]


def run_length(trainer: Trainer) -> float:
    """Steps of the whole run as :func:`run_step` counts them, ``inf`` where unknown.

    To be asked from ``on_train_start`` on: before, it would set up the data ahead of the state that a resumed run has
    for its loaders, which would start over then.
    """
    steps = trainer.estimated_stepping_batches
    return math.inf if steps < 0 else steps


def warn_of_restarted_data(trainer: Trainer) -> None:
    """Say what differs where a resumed run goes on in the middle of an epoch with a loader that cannot.

    To be called when training starts.
    """
    loop = trainer.fit_loop
    if not loop.restarted_mid_epoch or loop.epoch_loop.batch_progress.is_last_batch:
        return
    loaders = [] if loop._combined_loader is None else loop._combined_loader.flattened
    if all(hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict") for loader in loaders):
        return
    rank_zero_warn(
        f"The run goes on in the middle of epoch {trainer.current_epoch}, with a loader that starts over at its first "
        "batch. Schedules, DropBits' noise and the path of a budget go on exactly: they follow the step. But the rest "
        "of this epoch sees other batches than an uninterrupted run, so weights, steps and widths will differ from it. "
        "Resume from the end of an epoch, or with a loader that has state_dict and load_state_dict (torchdata's "
        "StatefulDataLoader), to end bit for bit the same."
    )


# Folders of runs that no logger has one for.
RUNS = "cpq_runs"
_folders: WeakKeyDictionary[Trainer, Path] = WeakKeyDictionary()


def run_folder(trainer: Trainer) -> Path:
    """The run's own folder; asked for on all ranks at once.

    That of the first logger, where it has one for each run. Else ``cpq_runs/version_0``, ``version_1``, … in the
    Trainer's ``default_root_dir``, counted up: it is made when it is first asked for in a fit.
    """
    if trainer not in _folders:
        _folders[trainer] = _logged_folder(trainer) or Path(
            trainer.strategy.broadcast(str(_new_folder(trainer)) if trainer.is_global_zero else "")
        )
    return _folders[trainer]


def begin_run(trainer: Trainer) -> None:
    """Let the next :func:`run_folder` of a Trainer be that of a new run; to be called ahead of a fit."""
    _folders.pop(trainer, None)


def _logged_folder(trainer: Trainer) -> Path | None:
    """Where Lightning keeps a run's checkpoints, without its last folder."""
    if not trainer.loggers:
        return None
    logger = trainer.loggers[0]
    own = getattr(logger, "log_dir", None)
    if isinstance(own, str | Path):
        return Path(trainer.strategy.broadcast(str(own)))
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
            # Another run's, begun at the same time.
            continue
        except OSError:
            # Whoever writes into it says so, and the training goes on.
            pass
        return folder
    raise AssertionError


def overrides(module: object, method: str) -> bool:
    """Whether a LightningModule defines a hook itself; of either package, ``lightning`` or ``pytorch_lightning``."""
    owner = next((cls for cls in type(module).__mro__ if method in cls.__dict__), None)
    return owner is not None and owner.__module__.split(".")[0] not in PACKAGES
