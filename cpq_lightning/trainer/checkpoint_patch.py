"""Checkpoints that were written before the last statistics of a fit were known."""

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
    """Checkpoints that were written at the step that the run is at, and that no metric has chosen."""
    paths: list[str] = []
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "_last_global_step_saved", None) == trainer.global_step:
            chosen = getattr(callback, "monitor", None) is not None
            names = ["last_model_path"] if chosen else ["best_model_path", "last_model_path"]
            paths += [getattr(callback, name, "") for name in names]
    return [path for path in dict.fromkeys(paths) if path]


def renew(trainer: Trainer, path: str, state: Mapping[str, Any], names: set[str]) -> None:
    """Put the statistics into a checkpoint that was written before them, where it holds the same weights.

    Saved anew it would hold more of the fit's end than them: widths that were fixed early, and averaged weights in
    place of those to resume from.
    """
    try:
        storage = trainer.strategy.checkpoint_io
        # Lightning before 2.6 reads checkpoints whole, and does not take the word.
        knows = "weights_only" in signature(trainer.strategy.load_checkpoint).parameters
        checkpoint = storage.load_checkpoint(path, **({"weights_only": True} if knows else {}))
        held = checkpoint["state_dict"]
        tensors = {name: value.cpu() for name, value in state.items() if isinstance(value, Tensor)}
        changed = {name for name, value in tensors.items() if not torch.equal(value, held[name].cpu())}
        if changed <= names:
            held.update({name: tensors[name] for name in changed})
            storage.save_checkpoint(checkpoint, path)
            return
        reason = f"it holds another {min(changed - names)!r} than the network"
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    rank_zero_warn(
        f"The checkpoint {path} keeps the moving averages in its batch norms ({reason}): trainer.save_checkpoint(path) "
        "saves the network as it is now."
    )
