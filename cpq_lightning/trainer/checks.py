"""Checks across the callbacks of a Trainer: which ones cannot be combined, and when quantization begins."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any, TypeAlias

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from cpq_lightning.functional.schedule import resolve_point
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.nn.sharding import is_sharded
from cpq_lightning.trainer.lightning_names import Callback, MisconfigurationException, is_a
from cpq_lightning.trainer.progress import run_length

# Lightning's callbacks that copy the model in their setup; by name, for both Lightning packages.
_AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")


Bests: TypeAlias = dict[str, list[Any]]


def check_callbacks(trainer: Trainer, checked: Callback) -> None:
    """Refuse a second callback of the same type, an averaging callback before this one, and FSDP1.

    Raises:
        MisconfigurationException: the message says what to change.
    """
    name = type(checked).__name__
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if sum(isinstance(c, type(checked)) for c in callbacks) > 1:
        raise MisconfigurationException(
            f"The Trainer has more than one {name}: keep one, and give settings of single layers through "
            "CPQConfig(overrides=...)."
        )
    for callback in callbacks[: callbacks.index(checked)]:
        if is_a(callback, *_AVERAGING):
            raise MisconfigurationException(
                f"{type(callback).__name__} stands before {name}, which must prepare the model that is averaged: put "
                f"{name} first in the list of callbacks. (A QuantizedModule adds one at the end of a list that has "
                "none.)"
            )
    if is_a(trainer.strategy, "FSDPStrategy"):
        raise MisconfigurationException(
            "FSDPStrategy (FSDP1) flattens parameters, and a quantized layer needs unflattened ones: use DDP, or FSDP2 "
            "(ModelParallelStrategy, with fully_shard in configure_model)."
        )
    mesh = getattr(trainer.strategy, "_device_mesh", None)
    if mesh is not None and mesh["tensor_parallel"].size() > 1:
        raise MisconfigurationException(
            f"ModelParallelStrategy(tensor_parallel_size={mesh['tensor_parallel'].size()}) splits products over "
            "processes, which quantized layers do not support: set tensor_parallel_size=1."
        )


def check_unsharded(quantizers: Iterable[tuple[str, Quantizer]]) -> None:
    """Refuse quantizers whose parameters are sharded.

    Raises:
        MisconfigurationException: the message says what to change.
    """
    for name, quantizer in quantizers:
        if any(is_sharded(p) for p in quantizer.parameters()):
            raise MisconfigurationException(
                f"The parameters of quantizer {name!r} are sharded (FSDP2), and must not be: exclude them in "
                "configure_model, fully_shard(..., ignored_params={p for _, q in quantizers(self) for p in "
                "q.parameters()}) with cpq_lightning.attach.quantizers, or let CPQCallback quantize a module that is "
                "not quantized yet."
            )


def check_learners(trainer: Trainer, learners: int) -> None:
    """Refuse quantizers that learn their width without a BitBudget.

    Raises:
        MisconfigurationException: the message says what to change.
    """
    if learners and not _callbacks_named(trainer, "BitBudget"):
        raise MisconfigurationException(
            f"{learners} quantizers are to learn their width, but nothing limits the cost of their bits: add a "
            "BitBudget, for example BitBudget(target=3.0), to the Trainer's callbacks, or remove learn_bits and "
            "learn_act_bits."
        )


def quantization_start(trainer: Trainer) -> int:
    """The step at which quantization begins; call it when training starts, or later."""
    points = [c.quantize_from for c in _callbacks_named(trainer, "CPQCallback")]
    # A run of unknown length is fine if no point is a fraction.
    length = run_length(trainer) if any(isinstance(point, float) and point for point in points) else math.inf
    return max((resolve_point("quantize_from", point, length) for point in points), default=0)


def monitored_metric(trainer: Trainer, logged: Collection[str]) -> str | None:
    """The metric by which reports compare runs; ``None`` if none is singled out.

    That is ``CPQCallback(monitor=...)``; else what the first checkpoint or early-stopping callback monitors that
    monitors a metric of the validation; else the only metric of the validation.

    Args:
        trainer: The trainer.
        logged: Names of the metrics that validation has logged.
    """
    watching = [*trainer.checkpoint_callbacks, *trainer.early_stopping_callbacks]
    chosen = [c.monitor for c in _callbacks_named(trainer, "CPQCallback") if c.monitor is not None]
    monitors = chosen or [getattr(c, "monitor", None) for c in watching]
    # The metric is logged without the suffix too.
    names = [name for m in monitors if m is not None for name in (m, m.removesuffix("_epoch")) if name in logged]
    only = list(logged) if len(logged) == 1 and not chosen else []
    return next(iter([*names, *only]), None)


def counts_operations(trainer: Trainer) -> bool:
    """Whether a budget counts bit operations, which need a forward before training."""
    return any(c.unit == "bops" for c in _callbacks_named(trainer, "BitBudget"))


def last_saved(trainer: Trainer) -> str:
    """Path of a checkpoint to continue from: the last one, or else the best one; empty if there is none."""
    for name in ("last_model_path", "best_model_path"):
        for callback in trainer.checkpoint_callbacks:
            if path := getattr(callback, name, ""):
                return path
    return ""


def monitored_bests(trainer: Trainer) -> Bests:
    """Path and score of the best checkpoint so far, for each callback that monitors a metric."""
    return {c.state_key: _best_checkpoint(c) for c in _monitoring_callbacks(trainer) if c.best_model_path}


def _best_checkpoint(callback: Any) -> list[Any]:
    score = callback.best_model_score
    return [callback.best_model_path, None if score is None else float(score)]


def warn_of_old_bests(trainer: Trainer, then: Bests, what: str) -> None:
    """Warn if the best checkpoint of a callback has not changed since an earlier step of the run.

    Args:
        trainer: A trainer at the end of its fit.
        then: The result of :func:`monitored_bests` at that step.
        what: Completes "was saved before ..." in the warning.
    """
    for callback in _monitoring_callbacks(trainer):
        path = callback.best_model_path
        # A file with a fixed name may have been overwritten.
        if path and then.get(callback.state_key) == _best_checkpoint(callback):
            rank_zero_warn(
                f"The best checkpoint by {callback.monitor!r}, {path}, was saved before {what}. Use a later one, or "
                "monitor from that step on (a ModelCheckpoint keeps the last one with save_last=True)."
            )


def _monitoring_callbacks(trainer: Trainer) -> list[Any]:
    return [c for c in trainer.checkpoint_callbacks if getattr(c, "monitor", None) and hasattr(c, "best_model_path")]


def _callbacks_named(trainer: Trainer, name: str) -> list[Any]:
    """The Trainer's callbacks of a class of this package, by name, because callbacks do not import each other."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [c for c in callbacks if is_a(c, name)]
