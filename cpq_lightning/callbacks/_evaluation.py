"""Validation, test and prediction of a module that was never fitted: ranges that last as long as the evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from cpq_lightning.attach import quantizers, set_active
from cpq_lightning.callbacks._batches import Item, Relay
from cpq_lightning.callbacks._calibration import run_calibration
from cpq_lightning.callbacks._names import is_a

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class LentRanges:
    """Activation ranges for one evaluation of a module that has none, from the first batches of its first loader.

    The batches are read when the evaluation starts, which gets them all the same. They run through its step when its
    first batch is there, since hooks of somebody's may prepare it until then. Afterwards all quantizers are what they
    were.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, most: int) -> None:
        self._module = pl_module
        self._found = [(q, _copy(q.state_dict()), q.measured, q.fits_next) for _, q in quantizers(pl_module)]
        self._loop: Any = trainer.predict_loop if trainer.predicting else trainer._evaluation_loop
        self._items: list[Item] = []
        self._missing = any(q.kind == "activation" for _, q in quantizers(pl_module))
        fetcher = self._loop._data_fetcher
        if self._missing and not is_a(fetcher, "_DataLoaderIterDataFetcher"):
            limits = self._loop.max_batches if fetcher.combined_loader._mode == "sequential" else [fetcher.length]
            limit = next((limit for limit in limits if limit), most)
            self._items = Relay.of(fetcher).read_ahead(int(min(most, limit)), one_loader=True)

    def calibrate(self, trainer: Trainer) -> None:
        """Called when the evaluation has a batch, of which the first sets the ranges and says so."""
        if not self._missing:
            return
        self._missing = False
        items, self._items = self._items, []
        name = "predict_step" if trainer.predicting else "test_step" if trainer.testing else "validation_step"
        if not trainer.strategy.reduce_boolean_decision(bool(items)):
            self._give_up(f"{name} takes the data's iterator, or a process has no batch")
            return
        plugin = trainer.precision_plugin
        context = {"validation_step": plugin.val_step_context, "test_step": plugin.test_step_context}
        several = self._loop.num_dataloaders > 1 and self._loop._combined_loader._mode == "sequential"

        def step(item: Item, batch: Any) -> None:
            kwargs = self._loop._build_kwargs(batch, item[1], item[2] if several else None)
            with context.get(name, plugin.predict_step_context)():
                getattr(self._module, name)(*self._loop._build_step_args_from_hook_kwargs(kwargs, name))

        error = run_calibration(trainer, self._module, items, step)
        if error is not None:
            # If the step is truly broken, it fails again in a moment, with nothing of ours around it.
            self._give_up(f"{name} failed with {type(error).__name__}: {error}")
            return
        rank_zero_warn(
            f"{type(self._module).__name__} was never fitted with quantizers, so it has no activation ranges: they "
            f"come from the first {len(items)} batches of this evaluation's first loader, and are forgotten behind it. "
            "Fit the module, give ckpt_path, or attach and calibrate it on training data before."
        )

    def take_back(self) -> None:
        """Give the quantizers back what they had."""
        for quantizer, state, measured, fits_next in self._found:
            quantizer.load_state_dict(state)
            quantizer.measured, quantizer.fits_next = measured, fits_next

    def _give_up(self, reason: str) -> None:
        rank_zero_warn(
            f"{type(self._module).__name__} was never fitted with quantizers, and has no activation ranges: they could "
            f"not be had from this evaluation's batches, because {reason}. It runs in full precision. Fit the module, "
            "give ckpt_path, or attach and calibrate it on training data before."
        )
        set_active(self._module, False)


def lend_ranges(trainer: Trainer, pl_module: LightningModule, most: int, quantize_from: float) -> LentRanges | None:
    """Ranges for an evaluation that starts, outside of a fit; ``None`` where nothing has to be lent."""
    activations = [q for _, q in quantizers(pl_module) if q.kind == "activation"]
    if not all(q.active for _, q in quantizers(pl_module)):
        if trainer.ckpt_path is None and not any(q.fitted for q in activations):
            rank_zero_warn(
                f"{type(pl_module).__name__} was never fitted with quantizers, or not as far as "
                f"quantize_from={quantize_from}: this evaluation runs in full precision. Fit the module, give "
                "ckpt_path, or leave quantize_from=0 to evaluate it quantized."
            )
        return None
    # What a forward notes of a module that only evaluations have quantized must not last either.
    if all(q.settled for _, q in quantizers(pl_module)) or any(q.fitted for q in activations):
        return None
    return LentRanges(trainer, pl_module, most)


def _copy(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in state.items()}
