"""Functions that read private attributes of Lightning: all such reads of the package are in this module.

``tests/trainer/test_private.py`` has a test for each attribute, which fails if a Lightning version lacks it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

DataFetcher = _DataFetcher
collect_rng_states = _collect_rng_states
set_rng_states = _set_rng_states
set_sampler_epoch = _set_sampler_epoch


def trainer_of(module: nn.Module) -> Trainer | None:
    """The Trainer of a LightningModule; ``None`` before it has one, where the property ``trainer`` raises."""
    return getattr(module, "_trainer", None)


def loaded_checkpoint(trainer: Trainer) -> dict[str, Any] | None:
    """The content of the checkpoint that the Trainer restores now; ``None`` where it restores none."""
    return trainer._checkpoint_connector._loaded_checkpoint or None


def optimizer_wrappers(trainer: Trainer) -> list[Any]:
    """Lightning's wrappers around the optimizers, in their order: what ``self.optimizers()`` gives a module."""
    return trainer.strategy._lightning_optimizers


def training_fetcher(trainer: Trainer) -> _DataFetcher | None:
    """What hands batches to the training loop; ``None`` before the data are set up."""
    return trainer.fit_loop._data_fetcher


def training_loader(trainer: Trainer) -> CombinedLoader | None:
    """The training loaders as one; ``None`` before the data are set up, or without training data."""
    return trainer.fit_loop._combined_loader


def loader_of(fetcher: _DataFetcher) -> Any:
    """What a fetcher iterates: a CombinedLoader, or what :func:`set_loader` has put in its place; ``None`` before."""
    return fetcher._combined_loader


def set_loader(fetcher: _DataFetcher, loader: Any) -> None:
    """Let a fetcher iterate something else in place of its loader."""
    fetcher._combined_loader = loader


def loader_states(loader: CombinedLoader) -> list[dict[str, Any]]:
    """The states of those loaders in it that have a ``state_dict``, as Lightning's checkpoints hold them."""
    return loader._state_dicts()


def before_batch_transfer(trainer: Trainer, batch: Any, dataloader_idx: int) -> Any:
    """A batch after the hook ``on_before_batch_transfer`` of the data module or the module."""
    return trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)


def averaged_models(trainer: Trainer) -> Iterator[nn.Module]:
    """The models that averaging callbacks keep, without torch's wrapper around them."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if average is not None:
            yield getattr(average, "module", average)


def training_source(trainer: Trainer) -> Any:
    """Where the training loaders come from: ``instance`` (loaders, a module or a data module) and ``is_module()``."""
    return trainer.fit_loop._data_source


def metrics_of_validation(trainer: Trainer) -> set[str]:
    """Names of the metrics that the validation which ends now has logged, as ``callback_metrics`` has them."""
    results: Any = trainer._results or {}
    logged = [metric for metric in results.values() if metric.meta.on_epoch and not metric.has_reset]
    # The first of both names: a metric that is logged in each step too has another with the suffix "_epoch".
    return {results._forked_name(metric, False)[0] for metric in logged}


def logged_step(trainer: Trainer) -> int:
    """The step that Lightning writes beside metrics that are logged now."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def logs_now(trainer: Trainer) -> bool:
    """Whether Lightning writes metrics to the loggers after this batch (``log_every_n_steps``)."""
    return trainer._logger_connector.should_update_logs


def can_stop_early(trainer: Trainer) -> bool:
    """Whether ``should_stop`` ends the fit now: ``min_epochs`` and ``min_steps`` are reached."""
    return trainer.fit_loop._can_stop_early


def is_last_training_batch_done(trainer: Trainer) -> bool:
    """Whether the training batches of this epoch have all been taken."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def restore_training_mode(trainer: Trainer, module: nn.Module) -> None:
    """Give each submodule the mode that it had before the validation that runs within the fit."""
    trainer.fit_loop.epoch_loop.val_loop._module_mode.restore(module)
