"""Base class of the schedules: a value for each step of the run, written into a buffer of the quantizers."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from cpq_lightning.attach.layers import parameter_of, quantized_layers, quantizers
from cpq_lightning.functional.schedule import Shape, anneal, resolve_point
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.trainer.lightning_names import Callback, MisconfigurationException
from cpq_lightning.trainer.progress import run_length, run_step


def check_span(start: int | float, end: int | float) -> None:
    """Check two points of a run, each a step count or a fraction of the run.

    Raises:
        ValueError: a point is out of range, or ``start`` is after ``end``.
    """
    for name, point in (("start", start), ("end", end)):
        resolve_point(name, point, 1)
    if type(start) is type(end) and start > end:
        raise ValueError(f"start must not be after end={end}, got {start}.")


def check_values(first: float, last: float, shape: Shape) -> None:
    """Check the first and the last value of a schedule, over 0 and at most 1, and its shape.

    Raises:
        ValueError: a value is out of range, or the shape is unknown.
    """
    for name, value in (("first", first), ("last", last)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise ValueError(f"{name} must be a number over 0 and up to 1, got {value!r}.")
    anneal(0, start=0, end=2, first=first, last=last, shape=shape)


def resolve_span(owner: str, start: int | float, end: int | float, trainer: Trainer) -> tuple[int, int]:
    """Convert both points to steps of the run; call it from ``on_train_start`` on.

    Raises:
        MisconfigurationException: ``start`` is after ``end``; the message names ``owner``.
    """
    fractions = isinstance(start, float) or isinstance(end, float)
    length = run_length(trainer) if fractions else 0
    first, last = (resolve_point(n, p, length) for n, p in (("start", start), ("end", end)))
    if first > last:
        raise MisconfigurationException(
            f"{owner}: start={start} is step {first}, after end={end}, step {last}, of a run of {length} steps."
        )
    return first, last


def need_quantizers(callback: Callback, pl_module: LightningModule) -> list[Quantizer]:
    """The module's quantizers.

    Raises:
        MisconfigurationException: the module has none.
    """
    all_quantizers = [q for _, q in quantizers(pl_module)]
    if not all_quantizers:
        raise MisconfigurationException(
            f"{type(callback).__name__} found no quantizer in {type(pl_module).__name__}: add CPQCallback to the "
            "Trainer, or train a QuantizedModule."
        )
    return all_quantizers


def warn_of_computed(callback: Callback, pl_module: LightningModule) -> None:
    """Warn of the layers that a callback leaves alone, because their weight is no Parameter of their own."""
    computed = [name for name, layer in quantized_layers(pl_module) if parameter_of(layer) is None]
    if computed:
        rank_zero_warn(
            f"{type(callback).__name__} leaves {len(computed)} layers alone, because their weight is computed from "
            f"other parameters (weight normalization, a pruning mask): {', '.join(computed)}."
        )


class BufferSchedule(Callback):
    """Anneals one buffer of the quantizers from ``first`` to ``last`` between ``start`` and ``end``.

    The value depends on the step alone, and the buffer is in the model's ``state_dict``. So a resumed run continues
    exactly, without a state of this callback.
    """

    buffer: str

    def __init__(self, *, start: int | float, end: int | float, first: float, last: float, shape: Shape) -> None:
        check_span(start, end)
        check_values(first, last, shape)
        self.start, self.end = start, end
        self.first, self.last = first, last
        self.shape: Shape = shape
        self._span: tuple[int, int] = (0, 0)
        self._driven: list[Quantizer] = []

    def drives(self, quantizer: Quantizer) -> bool:
        """Whether this schedule applies to a quantizer."""
        return True

    def nothing_to_drive(self) -> None:
        """Called if the model has quantizers, but this schedule applies to none of them."""

    def value(self, step: int) -> float:
        """The value at a step of the run; valid once training has started."""
        start, end = self._span
        return anneal(step, start=start, end=end, first=self.first, last=self.last, shape=self.shape)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._driven = [q for q in need_quantizers(self, pl_module) if self.drives(q)]
        if not self._driven:
            self.nothing_to_drive()
        self._span = resolve_span(type(self).__name__, self.start, self.end, trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        value = self.value(run_step(trainer))
        with torch.no_grad():
            for quantizer in self._driven:
                getattr(quantizer, self.buffer).fill_(value)
