"""ClusterPull: weights gather at their grid points as training ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from cpq_lightning.attach.layers import quantized_layers
from cpq_lightning.attach.parametrized import is_computed
from cpq_lightning.functional.schedule import Shape, anneal
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.optim.dampening import Dampening
from cpq_lightning.trainer.lightning_names import Callback
from cpq_lightning.trainer.progress import run_step
from cpq_lightning.trainer.schedule import check_span, need_quantizers, resolve_span


class ClusterPull(Callback):
    """Pull every quantized weight to its grid point as the run ends (ours).

    After each optimizer step ``w <- w + c (q(w) - w)``, with ``c`` annealed from 0 at ``start`` to ``strength`` at
    ``end``. It is what a penalty ``|w - q(w)|^2`` does (Nagel et al., *Overcoming Oscillations in Quantization-Aware
    Training*, ICML 2022, call it dampening), decoupled from gradient and learning rate as AdamW's weight decay is. No
    weight changes its level by the pull itself, but one that is held at a grid point needs more of a gradient to leave
    it, so the pull is for the end, when rates have usually come down. While
    :class:`~cpq_lightning.callbacks.BitBudget` learns widths nothing is pulled. An average of weights over the run
    (EMA, SWA) is one of pulled and earlier ones: it lies beside the grid.

    Args:
        start: Where pulling begins, a step count (int) or a fraction of the run (float).
        end: Where it is strongest, likewise.
        strength: The part of the way to the grid point that a weight is moved in one step, over 0 and up to 1.
        shape: ``"linear"`` or ``"cosine"``.

    Raises:
        ValueError: a value out of its range, or ``start`` after ``end``.
        MisconfigurationException: before training, a model without quantizers.

    Example:
        >>> ClusterPull(strength=0.2).start
        0.95
    """

    def __init__(
        self,
        start: int | float = 0.95,
        end: int | float = 1.0,
        strength: float = 0.1,
        shape: Shape = "linear",
    ) -> None:
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 1:
            raise ValueError(f"strength must be a number over 0 and up to 1, got {strength!r}.")
        check_span(start, end)
        anneal(1, 0, 2, 0.0, strength, shape)
        self.start, self.end, self.strength = start, end, strength
        self.shape: Shape = shape
        self._span = (0, 0)
        self._now = 0.0
        self._pulls: list[Dampening] = []

    def value(self, step: int) -> float:
        """The strength of the pull behind the update of a step, once a fit has begun."""
        return anneal(step + 1, *self._span, 0.0, self.strength, self.shape)

    def pulled(self, pl_module: LightningModule) -> Mapping[int, Quantizer]:
        """What pulls each weight, by the weight's ``id``."""
        need_quantizers(self, pl_module)
        layers = list(quantized_layers(pl_module))
        return {
            id(p): layer.weight_quantizer for _, layer in layers if (p := layer._parameters.get("weight")) is not None
        }

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.teardown(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        owners = self.pulled(pl_module)
        computed = [name for name, layer in quantized_layers(pl_module) if is_computed(layer)]
        if computed:
            rank_zero_warn(
                f"ClusterPull leaves {len(computed)} layers alone, whose weight is computed from others (weight "
                f"normalization, a pruning mask): {', '.join(computed)}."
            )
        self._span = resolve_span(type(self).__name__, self.start, self.end, trainer)
        self._pulls = [Dampening(optimizer, owners, lambda: self._now) for optimizer in trainer.optimizers]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._now = self.value(run_step(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning calls no teardown then.
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for pull in self._pulls:
            pull.remove()
        self._pulls, self._now = [], 0.0
