"""Evaluation of a module without activation ranges: temporary ranges, for one evaluation."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from cpq_lightning.attach.layers import quantizers
from cpq_lightning.nn.quantizer import Quantizer

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class TemporaryRanges:
    """Activation ranges for one evaluation, fitted in the forward of its first batch.

    The loop, the data and the steps of the evaluation do not change. With several processes, all of them use the ranges
    of the first process. Afterwards, :meth:`undo_attach` restores the quantizers.

    Args:
        kept: Quantizers whose state is restored after the evaluation.
        missing: Quantizers that need a range.
        reason: Start of the warning.
    """

    def __init__(self, kept: Iterable[Quantizer], missing: Iterable[Quantizer], reason: str) -> None:
        self._saved = [(q, copy.deepcopy(q.state_dict()), q.measured, q.fits_next) for q in kept]
        self._waiting = list(missing)
        self._reason = reason
        self.before_batch()

    def before_batch(self) -> None:
        """Let the forward of the first batch set the ranges; called before each batch."""
        # Needed before each batch: between the start and the first one, the Tuner evaluates and restores a checkpoint.
        for quantizer in self._waiting:
            quantizer.fits_next = not quantizer.fitted

    def after_batch(self, trainer: Trainer) -> None:
        """Share the ranges of the first batch with all processes; called after each batch."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        if trainer.world_size > 1:
            own = [copy.deepcopy(q.state_dict()) for q in waiting]
            states: list[dict[str, Tensor]] = trainer.strategy.broadcast(own)
            for quantizer, state in zip(waiting, states, strict=True):
                quantizer.load_state_dict(state)
                quantizer.fits_next = not quantizer.fitted
        if any(quantizer.fitted for quantizer in waiting):
            rank_zero_warn(
                f"{self._reason}: ranges come from the first batch of this evaluation, and are discarded after it."
            )

    def undo_attach(self) -> None:
        """Restore the state of the quantizers before the evaluation."""
        for quantizer, state, measured, fits_next in self._saved:
            quantizer.load_state_dict(state)
            quantizer.measured, quantizer.fits_next = measured, fits_next


def use_temporary_ranges(trainer: Trainer, pl_module: LightningModule, quantize_from: float) -> TemporaryRanges | None:
    """Temporary ranges for an evaluation that is starting; ``None`` if it needs none."""
    all_quantizers: list[Quantizer] = [q for _, q in quantizers(pl_module)]
    activations = [q for q in all_quantizers if q.kind == "activation"]
    if not all(q.active for q in all_quantizers):
        if trainer.state.fn != "fit" and trainer.ckpt_path is None and not any(q.fitted for q in activations):
            rank_zero_warn(
                f"{type(pl_module).__name__} was never fitted with quantizers, or not as far as "
                f"quantize_from={quantize_from}: this evaluation runs in full precision. Fit the module, give "
                "ckpt_path, or leave quantize_from=0 to evaluate it quantized."
            )
        return None
    missing = {n: q for n, q in quantizers(pl_module) if q.kind == "activation" and not q.fitted and not q.settled}
    if any(q.fitted for q in activations):
        names = ", ".join(missing)
        reason = (
            f"Neither calibration nor training has called the activation quantizers {names} of "
            f"{type(pl_module).__name__}, as an evaluation may do. Exclude their layers with ignore, or calibrate on "
            "data that call them"
        )
        return TemporaryRanges(missing.values(), missing.values(), reason) if missing else None
    if all(q.settled for q in all_quantizers):
        return None
    reason = (
        f"{type(pl_module).__name__} was never fitted with quantizers, so it has no activation ranges. Fit the module, "
        "give ckpt_path, or attach and calibrate it on training data before the evaluation"
    )
    # The notes that a forward makes in a module without a fit must not last either, so restore all quantizers.
    return TemporaryRanges(all_quantizers, missing.values(), reason)
