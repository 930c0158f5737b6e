"""OscillationMonitor and OscillationFreezing: weights that jump between two levels, measured and stopped."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from cpq_lightning.attach.layers import parameter_of, quantized_layers
from cpq_lightning.functional.schedule import Shape, anneal
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.nn.sharding import View
from cpq_lightning.optim.oscillation import Oscillation, OscillationHook
from cpq_lightning.trainer import private
from cpq_lightning.trainer.lightning_names import Callback
from cpq_lightning.trainer.progress import run_step
from cpq_lightning.trainer.schedule import check_span, check_values, need_quantizers, resolve_span, warn_of_computed


class OscillationMonitor(Callback):
    """Measure which share of each layer's weights oscillates between two levels.

    A weight whose best value lies between two levels is driven across the boundary of their cells again and again. At
    the end of training it is on either side by chance, and the running statistics of batch norms belong to none of the
    networks. Few-bit depthwise layers suffer most. The measure is that of Nagel et al., *Overcoming Oscillations in
    Quantization-Aware Training*, ICML 2022: the moving average of "the level has changed, in the direction opposite to
    its last change", for each weight. A weight oscillates if the average is above 0.005, one reversal in 200 steps.

    The share over all weights is logged as ``cpq/oscillating``. At the end of the fit each layer's share is in
    ``levels.json`` and in the table. While widths are learned, nothing is measured. The measurement keeps 12 bytes for
    each weight, in checkpoints too, from which a run resumes exactly.

    Args:
        momentum: Momentum of the moving average, over 0 and below 1.

    Raises:
        ValueError: ``momentum`` is out of range.
        MisconfigurationException: when training starts, the model has no quantizer.

    Example:
        >>> OscillationMonitor().momentum
        0.01
    """

    def __init__(self, *, momentum: float = 0.01) -> None:
        if isinstance(momentum, bool) or not isinstance(momentum, int | float) or not 0 < momentum < 1:
            raise ValueError(f"momentum must be a number over 0 and below 1, got {momentum!r}.")
        self.momentum = momentum
        self._weights: dict[str, tuple[Quantizer, Oscillation]] = {}
        self._hooks: list[OscillationHook] = []
        self._restored: dict[str, Any] = {}

    def threshold(self) -> float | None:
        """The frequency above which weights are frozen in the present step; ``None`` freezes none."""
        return None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.teardown(trainer, pl_module, stage)
        if stage == "fit":
            # A checkpoint that is restored comes after this.
            self._weights, self._restored = {}, {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        need_quantizers(self, pl_module)
        warn_of_computed(self, pl_module)
        tracked: dict[int, list[tuple[View, Quantizer, Oscillation]]] = {}
        for name, layer in quantized_layers(pl_module):
            quantizer, stored = layer.weight_quantizer, parameter_of(layer)
            if stored is None or any(quantizer is known for known, _ in self._weights.values()):
                continue
            parameter, view = stored
            oscillation = Oscillation(self.momentum)
            if name in self._restored:
                oscillation.load_state_dict(self._restored[name], parameter.device)
            self._weights[name] = (quantizer, oscillation)
            tracked.setdefault(id(parameter), []).append((view, quantizer, oscillation))
        self._hooks = [OscillationHook(optimizer, tracked, self.threshold) for optimizer in trainer.optimizers]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if private.logs_now(trainer):
            pl_module.log_dict(self._totals())

    def _totals(self) -> dict[str, float]:
        """The logged shares over all weights."""
        return _mean("cpq/oscillating", [(q, o.share()) for q, o in self._weights.values()])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note()

    def _note(self) -> None:
        for quantizer, oscillation in self._weights.values():
            quantizer.oscillating = oscillation.share()

    def state_dict(self) -> dict[str, Any]:
        return {name: oscillation.state_dict() for name, (_, oscillation) in self._weights.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class OscillationFreezing(OscillationMonitor):
    """Freeze weights that oscillate at the level where they have been most (Nagel et al., ICML 2022).

    A weight whose frequency of reversals exceeds a threshold stays on the level that is nearest to its mean level, for
    the rest of the run; its scale trains on. The threshold falls over the run: first only wild weights are frozen, in
    the end all that still oscillate. A new range of a layer, which training fits again when it has outgrown the old
    one, sets its weights free. The frozen share is logged as ``cpq/frozen``. See :class:`OscillationMonitor`, which
    measures without freezing, for what else is logged.

    Args:
        start: Start of the annealing: a step count (int) or a fraction of the run (float). Before it, the threshold is
            ``first``.
        end: End of the annealing, from which on the threshold is ``last``.
        first: First threshold of the frequency, over 0 and at most 1.
        last: Last threshold, over 0 and at most 1.
        shape: A shape of :func:`~cpq_lightning.functional.anneal`.
        momentum: Momentum of the moving average, over 0 and below 1.

    Raises:
        ValueError: a value is out of range, or ``start`` is after ``end``.
        MisconfigurationException: when training starts, the model has no quantizer.

    Example:
        >>> OscillationFreezing(last=0.02).first
        0.1
    """

    def __init__(
        self,
        *,
        start: int | float = 0.0,
        end: int | float = 1.0,
        first: float = 0.1,
        last: float = 0.01,
        shape: Shape = "cosine",
        momentum: float = 0.01,
    ) -> None:
        super().__init__(momentum=momentum)
        check_span(start, end)
        check_values(first, last, shape)
        self.start, self.end, self.first, self.last = start, end, first, last
        self.shape: Shape = shape
        self._span = (0, 0)
        self._threshold_now = first

    def threshold(self) -> float | None:
        return self._threshold_now

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._span = resolve_span(type(self).__name__, self.start, self.end, trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        start, end = self._span
        self._threshold_now = anneal(
            run_step(trainer), start=start, end=end, first=self.first, last=self.last, shape=self.shape
        )

    def _totals(self) -> dict[str, float]:
        frozen = _mean("cpq/frozen", [(q, o.frozen_share()) for q, o in self._weights.values()])
        return {**super()._totals(), **frozen}


def _mean(name: str, shares: list[tuple[Quantizer, float | None]]) -> dict[str, float]:
    """The mean of shares over all weights; empty before a step."""
    known = [(quantizer.numel, share) for quantizer, share in shares if share is not None]
    total = sum(numel for numel, _ in known)
    return {name: sum(numel * share for numel, share in known) / total} if total else {}
