"""DropBitsSchedule: anneals the keep probability of the DropBits gates to 1."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_warn

from cpq_lightning.functional.schedule import Shape
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.trainer.schedule import BufferSchedule


class DropBitsSchedule(BufferSchedule):
    """Anneal the keep probability of the DropBits gates at fixed bits, from ``first`` to ``last``.

    In each training step, every gate is open with this probability, ``P(z > 0) = keep``. A closed gate drops its bit
    and all higher bits. Evaluation uses all bits. The schedule applies to weight quantizers with ``min_bits`` below
    ``weight_bits`` whose bits are not learned. If the model has none, the callback warns and does nothing.

    Args:
        start: Start of the annealing: a step count (int) or a fraction of the run (float).
        end: End of the annealing: a step count (int) or a fraction of the run (float). By default the last tenth of the
            run trains all bits, as evaluation uses them; benchmarks/findings measured DropBits so.
        first: Keep probability until ``start``, over 0 and at most 1.
        last: Keep probability from ``end`` on, over 0 and at most 1.
        shape: A shape of :func:`~cpq_lightning.functional.anneal`.

    Raises:
        ValueError: a value is out of range, or ``start`` is after ``end``.
        MisconfigurationException: when training starts, the model has no quantizer.

    Example:
        >>> DropBitsSchedule(first=0.8).last
        1.0
    """

    buffer = "keep_prob"

    def __init__(
        self,
        *,
        start: int | float = 0.0,
        end: int | float = 0.9,
        first: float = 0.9,
        last: float = 1.0,
        shape: Shape = "linear",
    ) -> None:
        super().__init__(start=start, end=end, first=first, last=last, shape=shape)

    def drives(self, quantizer: Quantizer) -> bool:
        return quantizer.has_gates and not quantizer.gates.learned

    def nothing_to_drive(self) -> None:
        rank_zero_warn(
            "DropBitsSchedule found no gate to drive: every quantizer has min_bits equal to its bits, so no bit can be "
            "dropped. Give CPQConfig a min_bits below weight_bits, for example CPQConfig(weight_bits=4, min_bits=3), "
            "or remove DropBitsSchedule."
        )
