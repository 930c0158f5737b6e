"""ProgressiveWidths: narrows all widths in stages until they are those of the config."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from cpq_lightning.attach.layers import quantized_layers, quantizers
from cpq_lightning.checkpoint import STAGE_KEY
from cpq_lightning.functional.grid import check_bits
from cpq_lightning.functional.schedule import resolve_point
from cpq_lightning.trainer.checks import Bests, monitored_bests, quantization_start, warn_of_old_bests
from cpq_lightning.trainer.lightning_names import Callback, MisconfigurationException
from cpq_lightning.trainer.progress import run_length, run_step
from cpq_lightning.trainer.schedule import need_quantizers
from cpq_lightning.trainer.weight_averaging import share_with_averages


class ProgressiveWidths(Callback):
    """Train at wide grids first, and narrow all widths in stages: 8, 5, 4 bits, then the widths of the config.

    In a stage of w bits, each weight and each activation has w bits or its own width, whichever is wider. When a stage
    begins, the range of each narrowed weight is fitted to the weight, and that of each narrowed activation to the next
    batch. PROFIT (Park and Yoo, ECCV 2020) narrows the widths of MobileNets so, with a teacher: add a
    :class:`~cpq_lightning.callbacks.DistillationCallback` for one.

    Widths are not learned meanwhile, and no bit is dropped. Metrics before the last stage are those of a wider network;
    a warning names checkpoints that were saved before it and still count as the best, and such a checkpoint says so
    where it is loaded, except to continue the run with this callback. A run that ends earlier is narrowed at its end,
    with a warning.

    Args:
        widths: Bits of the stages, each narrower than the one before.
        end: From when on all widths are those of the config: a step count (int) or a fraction of the run (float). The
            stages before have equal lengths, from the first quantized step on.

    Raises:
        ValueError: an argument is out of range.
        MisconfigurationException: when training starts: the model has no quantizer, widths are learned or drop bits, a
            channel has a width of its own, or ``end`` is before the first quantized step.

    Example:
        >>> ProgressiveWidths(end=0.6).widths
        (8, 5, 4)
    """

    def __init__(self, *, widths: Sequence[int] = (8, 5, 4), end: int | float = 0.5) -> None:
        stages = tuple(check_bits(f"widths[{place}]", bits) for place, bits in enumerate(widths))
        if not stages or any(later >= earlier for earlier, later in itertools.pairwise(stages)):
            raise ValueError(f"widths must be one or more numbers of bits, each below the one before, got {widths!r}.")
        resolve_point("end", end, 1)
        self.widths, self.end = stages, end
        self._reset()

    def _reset(self) -> None:
        self._targets: dict[str, int] = {}
        self._starts: list[tuple[int, int]] = []
        self._bests: Bests = {}
        self._done = False
        self._stage = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._reset()

    def state_dict(self) -> dict[str, Any]:
        return {"targets": self._targets, "bests": self._bests, "done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._targets, self._bests, self._done = (dict(state_dict["targets"]), state_dict["bests"], state_dict["done"])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._starts and not self._done:
            # Whoever loads it without this callback is told that it is wider than its config.
            checkpoint[STAGE_KEY] = {"callback": self.state_key, "step": run_step(trainer), "bits": self._stage}

    def bits(self, step: int) -> int:
        """The least width at a step of the run, 0 in the last stage; valid once training has started."""
        return next((bits for start, bits in reversed(self._starts) if step >= start), self._starts[0][1])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        need_quantizers(self, pl_module)
        gated = [name for name, q in quantizers(pl_module) if q.has_gates or q.fixed]
        if gated:
            raise MisconfigurationException(
                f"ProgressiveWidths sets all widths, and {len(gated)} quantizers learn theirs, drop bits or have one "
                f"for each channel ({gated[0]}, ...): remove learn_bits, learn_act_bits, min_bits and lists of widths, "
                "or remove ProgressiveWidths."
            )
        if not self._targets:
            self._targets = {name: q.bits for name, q in quantizers(pl_module)}
        stages = [bits for bits in self.widths if bits > min(self._targets.values())]
        start = quantization_start(trainer)
        end = resolve_point("end", self.end, run_length(trainer) if isinstance(self.end, float) else 0)
        if stages and end == start == 0:
            # A run of one step, as fast_dev_run makes it, has no time for stages.
            rank_zero_info("ProgressiveWidths: the run has no step before its last widths, and begins with them.")
            stages = []
        if stages and end <= start:
            raise MisconfigurationException(
                f"ProgressiveWidths: end={self.end} is step {end}, and quantization begins at step {start}: give a "
                "later end, or an earlier quantize_from to CPQCallback."
            )
        lengths = (end - start) / max(1, len(stages))
        self._starts = [(start + round(place * lengths), bits) for place, bits in enumerate(stages)] + [(end, 0)]
        self._enter(trainer, pl_module, run_step(trainer))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._enter(trainer, pl_module, run_step(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._done or not self._starts:
            return
        changed = self._narrow(pl_module, 0, refit=False)
        self._done = True
        if changed:
            rank_zero_warn(
                f"The run ended at step {run_step(trainer)}, before the last stage of ProgressiveWidths at step "
                f"{self._starts[-1][0]}: {len(changed)} widths are narrowed now, on the same ranges and without "
                "training. Train longer, or give ProgressiveWidths an earlier end."
            )
            share_with_averages(trainer, pl_module, changed)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        warn_of_old_bests(trainer, self._bests, "ProgressiveWidths had reached the last widths: it is a wider network")

    def _enter(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        bits = self.bits(step)
        if self._done:
            return
        self._stage = bits
        if not bits:
            self._done, self._bests = True, monitored_bests(trainer)
        changed = self._narrow(pl_module, bits)
        if changed:
            rank_zero_info(
                f"ProgressiveWidths: {len(changed)} quantizers have {bits or 'their last'} bits from step {step} on."
            )
            share_with_averages(trainer, pl_module, changed)

    def _narrow(self, pl_module: LightningModule, bits: int, refit: bool = True) -> set[str]:
        """Give each quantizer ``bits``, or its own width if that is wider; return the names of those that change."""
        weights = {layer.weight_quantizer: layer for _, layer in quantized_layers(pl_module)}
        changed: set[str] = set()
        for name, quantizer in quantizers(pl_module):
            target = max(bits, self._targets.get(name, 0))
            if not target or quantizer.bits == target:
                continue
            changed.add(name)
            quantizer.set_width(target)
            layer = weights.get(quantizer)
            if layer is not None and quantizer.fitted:
                quantizer.fit_weight(layer.read_weight())
            elif layer is None and refit:
                quantizer.refit_next()
        return changed
