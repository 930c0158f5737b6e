"""Updates checkpoints that were saved before the last batch norm statistics of a fit were estimated."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def saved_checkpoints(trainer: Trainer) -> list[str]:
    """Paths of the checkpoints that were saved at the current step and not selected by a metric."""
    paths: list[str] = []
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "_last_global_step_saved", None) == trainer.global_step:
            is_monitored = getattr(callback, "monitor", None) is not None
            names = ["last_model_path"] if is_monitored else ["best_model_path", "last_model_path"]
            paths += [getattr(callback, name, "") for name in names]
    return [path for path in dict.fromkeys(paths) if path]


def renew(trainer: Trainer, path: str, state: Mapping[str, Any], names: set[str]) -> None:
    """Write new statistics into a checkpoint if its other tensors equal those of the network; otherwise warn.

    The checkpoint is not simply saved again, because it would then have more of the end of the fit than the statistics:
    widths that were fixed early, and averaged weights instead of those to resume from.

    Args:
        trainer: The fit's trainer.
        path: The checkpoint.
        state: The state of the network with the new statistics.
        names: Names of the statistics in ``state``.
    """
    try:
        storage = trainer.strategy.checkpoint_io
        # Lightning before 2.6 has no argument weights_only.
        takes_weights_only = "weights_only" in signature(trainer.strategy.load_checkpoint).parameters
        checkpoint = storage.load_checkpoint(path, **({"weights_only": True} if takes_weights_only else {}))
        saved_state = checkpoint["state_dict"]
        tensors = {name: value.cpu() for name, value in state.items() if isinstance(value, Tensor)}
        changed = {name for name, value in tensors.items() if not torch.equal(value, saved_state[name].cpu())}
        if changed <= names:
            saved_state.update({name: tensors[name] for name in changed})
            storage.save_checkpoint(checkpoint, path)
            return
        reason = f"its {min(changed - names)!r} differs from the network's"
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    rank_zero_warn(
        f"The checkpoint {path} keeps the moving averages in its batch norms ({reason}): trainer.save_checkpoint(path) "
        "saves the current network."
    )
