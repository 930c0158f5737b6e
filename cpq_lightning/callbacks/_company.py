"""What CPQCallback cannot share a Trainer with."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer

# Lightning's callbacks that copy the model in their setup; by name, for either of its packages.
_AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")


def check_company(trainer: Trainer, own: Callback) -> None:
    """Refuse a second callback of the same type, an averaging callback before this one, and FSDP1.

    Raises:
        MisconfigurationException: with what to do.
    """
    name = type(own).__name__
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if sum(isinstance(c, type(own)) for c in callbacks) > 1:
        raise MisconfigurationException(
            f"The Trainer has more than one {name}: keep one, and give settings of single layers through "
            "CPQConfig(overrides=...)."
        )
    for callback in callbacks[: callbacks.index(own)]:
        if any(cls.__name__ in _AVERAGING for cls in type(callback).__mro__):
            raise MisconfigurationException(
                f"{type(callback).__name__} stands before {name}, which must prepare the model that is averaged: put "
                f"{name} first in the list of callbacks. (A QuantizedModule adds one at the end where the list has "
                "none.)"
            )
    if any(cls.__name__ == "FSDPStrategy" for cls in type(trainer.strategy).__mro__):
        raise MisconfigurationException(
            "FSDPStrategy (FSDP1) flattens parameters, and a quantized layer needs its own: use DDP. (FSDP2, "
            "ModelParallelStrategy, keeps parameters apart but shards them, which is not supported yet either.)"
        )
