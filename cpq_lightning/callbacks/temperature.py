"""TemperatureSchedule: anneals the rounding temperature."""

from __future__ import annotations

from cpq_lightning.functional.schedule import Shape
from cpq_lightning.trainer.schedule import BufferSchedule


class TemperatureSchedule(BufferSchedule):
    """Anneal the rounding temperature T of every quantizer.

    Gradients are computed with the rounding noise ``T * sigma``. As T falls, the gradient of the estimator
    ``expectation`` vanishes at the grid points and peaks at the boundaries between them, so weights gather in clusters
    around the grid points. Evaluation does not depend on T.

    Args:
        start: Start of the annealing: a step count (int) or a fraction of the run (float).
        end: End of the annealing: a step count (int) or a fraction of the run (float).
        first: T until ``start``, over 0 and at most 1.
        last: T from ``end`` on, over 0 and at most 1.
        shape: A shape of :func:`~cpq_lightning.functional.anneal`.

    Raises:
        ValueError: a value is out of range, or ``start`` is after ``end``.
        MisconfigurationException: when training starts, the model has no quantizer.

    Example:
        >>> TemperatureSchedule(start=0.5, last=0.25).last
        0.25
    """

    buffer = "temperature"

    def __init__(
        self,
        *,
        start: int | float = 0.0,
        end: int | float = 1.0,
        first: float = 1.0,
        last: float = 0.5,
        shape: Shape = "linear",
    ) -> None:
        super().__init__(start=start, end=end, first=first, last=last, shape=shape)
