"""TemperatureSchedule: the rounding temperature, annealed."""

from __future__ import annotations

from cpq_lightning.functional.schedule import Shape
from cpq_lightning.trainer.schedule import BufferSchedule


class TemperatureSchedule(BufferSchedule):
    """Anneal the rounding temperature T of every quantizer; the noise that gradients see is ``T * sigma``.

    With a falling temperature the gradient of ``expectation`` vanishes at the grid points and peaks at the cell
    boundaries: weights gather in clusters around the grid. Evaluation does not depend on T.

    Args:
        start: Where annealing begins, a step count (int) or a fraction of the run (float).
        end: Where it ends, likewise.
        first: T up to ``start``, over 0 and up to 1.
        last: T from ``end`` on.
        shape: ``"linear"``, ``"cosine"`` or ``"exponential"``.

    Raises:
        ValueError: a value out of its range, or ``start`` after ``end``.
        MisconfigurationException: before training, a model without quantizers.

    Example:
        >>> TemperatureSchedule(start=0.5, last=0.25).last
        0.25
    """

    buffer = "temperature"

    def __init__(
        self,
        start: int | float = 0.0,
        end: int | float = 1.0,
        first: float = 1.0,
        last: float = 0.5,
        shape: Shape = "linear",
    ) -> None:
        super().__init__(start, end, first, last, shape)
