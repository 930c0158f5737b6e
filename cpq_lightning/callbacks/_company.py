"""What callbacks have to know of one another: what cannot share a Trainer, and who begins when."""

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


def check_learners(trainer: Trainer, learners: int) -> None:
    """Refuse widths that nobody trains.

    Raises:
        MisconfigurationException: with what to do.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if learners and not any(cls.__name__ == "BitBudget" for c in callbacks for cls in type(c).__mro__):
        raise MisconfigurationException(
            f"{learners} quantizers are to learn their width, but nothing tells them what bits may cost: add a "
            "BitBudget, for example BitBudget(target=3.0), to the Trainer's callbacks, or leave learn_bits and "
            "learn_act_bits out."
        )


def quantization_start(trainer: Trainer) -> int:
    """The step at which quantization begins, once a fit has begun."""
    return max((getattr(c, "start_step", 0) for c in trainer.callbacks), default=0)  # type: ignore[attr-defined]


def counts_operations(trainer: Trainer) -> bool:
    """Whether a budget counts bit operations, which a forward has to show before training."""
    return any(getattr(c, "unit", None) == "bops" for c in trainer.callbacks)  # type: ignore[attr-defined]
