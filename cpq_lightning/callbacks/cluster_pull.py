"""ClusterPull: dampening that moves weights to their grid points at the end of training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from cpq_lightning.attach.layers import parameter_of, quantized_layers
from cpq_lightning.functional.schedule import Shape, anneal
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.nn.sharding import View
from cpq_lightning.optim.dampening import Dampening
from cpq_lightning.trainer.lightning_names import Callback
from cpq_lightning.trainer.progress import run_step
from cpq_lightning.trainer.schedule import check_span, need_quantizers, resolve_span, warn_of_computed


class ClusterPull(Callback):
    """Dampen every quantized weight towards its grid point at the end of the run (ours).

    After each optimizer step, ``w <- w + c (q(w) - w)``, with ``c`` annealed from 0 at ``start`` to ``strength`` at
    ``end``. The penalty ``|w - q(w)|^2`` has the same effect (Nagel et al., *Overcoming Oscillations in
    Quantization-Aware Training*, ICML 2022, call it dampening; Han et al., ICCV 2021, pull each bin's mean). Here it is
    decoupled from the gradient, and from the learning rate unless ``scale_by_lr``, as weight decay is in AdamW.
    Dampening itself never changes the level of a weight. But a dampened weight needs
    a larger gradient to leave its grid point, so use it at the end of training, when the learning rate is usually low.
    While :class:`~cpq_lightning.callbacks.BitBudget` learns widths, no weight is dampened. An average of weights over
    the run (EMA, SWA) mixes dampened weights with earlier ones, so averaged weights do not lie on the grid points.

    Args:
        start: Start of the dampening: a step count (int) or a fraction of the run (float).
        end: Point of full strength: a step count (int) or a fraction of the run (float).
        strength: The part of the distance to its grid point that a weight moves in one step, over 0 and at most 1; with
            ``scale_by_lr`` any number over 0.
        shape: A shape of :func:`~cpq_lightning.functional.anneal` that may begin at 0.
        scale_by_lr: Whether the part is ``strength`` times the learning rate of the weight's group (at most 1), as it
            is for a penalty ``strength/2 |w - q(w)|^2`` in the loss. This suits dampening from early on against
            oscillation, such as ``ClusterPull(start=0.0, strength=50, shape="cosine", scale_by_lr=True)``.

    Raises:
        ValueError: a value is out of range, or ``start`` is after ``end``.
        MisconfigurationException: when training starts, the model has no quantizer.

    Example:
        >>> ClusterPull(strength=0.2).start
        0.95
    """

    def __init__(
        self,
        *,
        start: int | float = 0.95,
        end: int | float = 1.0,
        strength: float = 0.1,
        shape: Shape = "linear",
        scale_by_lr: bool = False,
    ) -> None:
        most = math.inf if scale_by_lr else 1
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= most:
            limit = "" if scale_by_lr else " and up to 1 (any with scale_by_lr=True)"
            raise ValueError(f"strength must be a number over 0{limit}, got {strength!r}.")
        check_span(start, end)
        anneal(1, start=0, end=2, first=0.0, last=strength, shape=shape)
        self.start, self.end, self.strength = start, end, strength
        self.shape: Shape = shape
        self.scale_by_lr = scale_by_lr
        self._span = (0, 0)
        self._strength_now = 0.0
        self._pulls: list[Dampening] = []

    def value(self, step: int) -> float:
        """The dampening strength ``c`` after the optimizer update of a step; valid once training has started."""
        start, end = self._span
        return anneal(step + 1, start=start, end=end, first=0.0, last=self.strength, shape=self.shape)

    def pulled(self, pl_module: LightningModule) -> Mapping[int, Sequence[tuple[View, Quantizer]]]:
        """The quantizers of the dampened weights, keyed by the ``id`` of the Parameter, with the views of it that are
        the weights.
        """
        need_quantizers(self, pl_module)
        pulled: dict[int, dict[Quantizer, View]] = {}
        for _, layer in quantized_layers(pl_module):
            if (stored := parameter_of(layer)) is not None:
                pulled.setdefault(id(stored[0]), {})[layer.weight_quantizer] = stored[1]
        return {key: [(view, quantizer) for quantizer, view in views.items()] for key, views in pulled.items()}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.teardown(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        quantizer_of_weight = self.pulled(pl_module)
        warn_of_computed(self, pl_module)
        self._span = resolve_span(type(self).__name__, self.start, self.end, trainer)
        self._pulls = [
            Dampening(optimizer, quantizer_of_weight, lambda: self._strength_now, self.scale_by_lr)
            for optimizer in trainer.optimizers
        ]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._strength_now = self.value(run_step(trainer))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for pull in self._pulls:
            pull.remove()
        self._pulls, self._strength_now = [], 0.0
