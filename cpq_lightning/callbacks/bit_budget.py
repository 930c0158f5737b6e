"""BitBudget: learned widths, brought to a target within the run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from cpq_lightning.attach.first_forward import auditable
from cpq_lightning.attach.layers import quantizers
from cpq_lightning.bitwidth.constraints import (
    BudgetUnit,
    check_not_all_first_or_last,
    explain_nothing_to_learn,
    make_constraints,
)
from cpq_lightning.bitwidth.cost import WidthCost
from cpq_lightning.bitwidth.model_cost import learning_quantizers, model_costs, widths_by_name
from cpq_lightning.bitwidth.search import WidthSearch
from cpq_lightning.functional.schedule import resolve_point
from cpq_lightning.optim.optimizer_hook import OptimizerHook
from cpq_lightning.packing.size import byte_cost, packed_size
from cpq_lightning.trainer.checks import Bests, last_saved, monitored_bests, quantization_start, warn_of_old_bests
from cpq_lightning.trainer.lightning_names import Callback, MisconfigurationException
from cpq_lightning.trainer.loggers import log_widths
from cpq_lightning.trainer.module_parts import exported_architecture, exported_part
from cpq_lightning.trainer.optimizers import hook_optimizers
from cpq_lightning.trainer.progress import run_folder, run_length, run_step
from cpq_lightning.trainer.trajectory import Trajectory
from cpq_lightning.trainer.weight_averaging import share_with_averages

_FEW_STEPS = 60


class BitBudget(Callback):
    """Learn each layer's bit-width under a budget that the run keeps, and fix the widths within the same run.

    Needs quantizers that learn, ``CPQConfig(weight_bits=8, min_bits=2, learn_bits=True)``. From the first quantized
    step to the freeze the gates' logits are trained by the loss and by a penalty ``lambda · cost`` of the expected bits
    (the paper's), with ``lambda`` solved for in each step (ours), so that the expected cost follows a path from where
    it starts to the target. What the loss says of a gate is ``CPQConfig(gate_estimator=...)``. Noise and temperature of
    the gates fall on the way (ours). Then whole widths are decided: those of the open gates, less the bits that are
    worth least for what they cost while these are over the target, and more of those that are worth most while some
    still fit. The target is a limit: widths cost it or less, as little less as is found, and the log names the changes
    and what is left. At ``freeze`` the widths become fixed, and the chosen network trains on. A run that ends earlier
    fixes them at its end.

    Logits are trained beside the module's optimizers, in their rhythm: they are in none of them, and neither the
    learning rate nor gradient clipping reaches them.

    Logged: ``cpq/weight_bits`` (as evaluation has them), ``cpq/expected_weight_bits``, the same of learned activations,
    ``cpq/size_bytes`` (of the packed file), ``cpq/penalty``, ``cpq/target``; after each validation every layer's bits,
    as a table or as text where the logger takes one. The folder of the run gets ``trajectory.csv`` and
    ``trajectory.png`` at the end.

    Args:
        target: What the model may cost at most: average bits of the weights (first and last layer aside), bytes of the
            file that ``cpq export --format packed`` writes, its header included, or bit operations of one sample (the
            sum over layers of multiply-accumulates times weight bits times activation bits).
        unit: ``"bits"``, ``"bytes"`` or ``"bops"``.
        act_target: Average bits of learned activations; ``None`` is ``target`` in ``"bits"``. Has to be given in
            ``"bytes"``, where activations cost nothing, and left out in ``"bops"``, which count both.
        freeze: When the widths become fixed, as a step count or a fraction of the run; ``None`` is halfway from the
            first quantized step to the run's end. With ``gate_estimator="concrete"``, whose gradients are noisier, 0.8
            served better.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: before training: no quantizer that learns, or none but those of first and last
            layers, a target out of reach (with the range that is within it), or a freeze before quantization begins.

    Example:
        >>> BitBudget(target=3.0).unit
        'bits'
    """

    def __init__(
        self,
        target: float,
        unit: BudgetUnit = "bits",
        *,
        act_target: float | None = None,
        freeze: int | float | None = None,
    ) -> None:
        if unit not in ("bits", "bytes", "bops"):
            raise ValueError(f"unit must be 'bits', 'bytes' or 'bops', got {unit!r}.")
        for name, value in (("target", target), ("act_target", act_target)):
            if value is None and name == "act_target":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number over 0, got {value!r}.")
        if act_target is not None and unit == "bops":
            raise ValueError(
                "act_target has no place beside unit='bops', which counts weights and activations together."
            )
        if freeze is not None:
            resolve_point("freeze", freeze, 1)
        self.target, self.act_target, self.freeze = target, act_target, freeze
        self.unit: BudgetUnit = unit
        self._reset()

    def _reset(self) -> None:
        self._search: WidthSearch | None = None
        # Batches that have begun while the search waits for what a first one shows; None where it does not.
        self._awaited: int | None = None
        # Where the search has gone once its widths are fixed, for what is shown and saved.
        self._done: dict[str, Any] | None = None
        self._freeze = 0
        self._beside: list[OptimizerHook] = []
        self._bests: Bests = {}
        self._trajectory = Trajectory()
        self._restored: dict[str, Any] = {}

    @property
    def changes(self) -> list[dict[str, Any]]:
        """Widths that were changed to meet the target: name of the quantizer, bits before and after."""
        state = self._done if self._search is None else self._search.state_dict()
        return [] if state is None else state["changes"]

    # Hooks, in the order in which they fire ---------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.teardown(trainer, pl_module, stage)
            self._reset()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def state_dict(self) -> dict[str, Any]:
        return {
            "search": self._done if self._search is None else self._search.state_dict(),
            "bests": self._bests,
            "trajectory": self._trajectory.state_dict(),
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._restored:
            self._done, self._bests = self._restored["search"], self._restored["bests"]
            self._trajectory.load_state_dict(self._restored["trajectory"])
        if not learning_quantizers(pl_module):
            with _misconfigured():
                sentence, serious = explain_nothing_to_learn(pl_module, self._targets(), self._done)
            (rank_zero_warn if serious else rank_zero_info)(sentence)
            return
        if self.freeze is None:
            start, length = quantization_start(trainer), run_length(trainer)
            if not math.isfinite(length):
                raise MisconfigurationException(
                    "BitBudget: the run has no length to be halfway through: give freeze as a step count, or the "
                    "Trainer max_steps, or a loader with a length."
                )
            self._freeze = start + math.ceil(max(0, length - start) / 2)
        else:
            length = run_length(trainer) if isinstance(self.freeze, float) else math.inf
            self._freeze = resolve_point("freeze", self.freeze, length)
        # Only where calibration has failed: which layers are first and last shows in the first batch then.
        if auditable(pl_module) and not any(q.execution_index for _, q in quantizers(pl_module)):
            self._awaited = 0
        else:
            self._start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = run_step(trainer)
        if self._awaited is not None:
            # In the second batch all callbacks have seen the first one's end.
            self._awaited += 1
            if self._awaited > 1:
                self._awaited = None
                self._start(trainer, pl_module)
        if self._search is None:
            return
        if step >= self._freeze:
            self._fix(trainer, pl_module)
        else:
            self._search.enter(step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._search is not None:
            self._search.leave(run_step(trainer))
        begun = self._done is not None if self._search is None else self._search.begin is not None
        row = begun and self._trajectory.due(run_step(trainer), run_length(trainer))
        if row or (begun and trainer._logger_connector.should_update_logs):
            values = self._values(pl_module)
            pl_module.log_dict({f"cpq/{name}": float(value) for name, value in values.items()})
            if row:
                self._trajectory.note(run_step(trainer), values, widths_by_name(pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if "val" in k and v.numel() == 1}
        self._trajectory.note_metrics(run_step(trainer), metrics)
        if trainer.is_global_zero:
            log_widths(trainer, widths_by_name(pl_module), run_step(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        quiet = bool(getattr(trainer, "fast_dev_run", False))
        if self._search is not None and self._search.begin is None:
            rank_zero_warn(f"BitBudget: the run ended at step {run_step(trainer)}, before any width was learned.")
        elif self._search is not None:
            if run_step(trainer) < self._freeze and not quiet:
                rank_zero_warn(
                    f"The run ended at step {run_step(trainer)}, before the freeze at step {self._freeze}: widths are "
                    "fixed now, with no training behind it, and no checkpoint of this run has them: "
                    "trainer.save_checkpoint(path) makes one."
                )
            self._fix(trainer, pl_module)
        if self._done is None or quiet:
            return
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        self._trajectory.note(run_step(trainer), self._values(pl_module), widths_by_name(pl_module))
        self._trajectory.save(folder, last_saved(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        warn_of_old_bests(trainer, self._bests, "BitBudget had fixed the widths: it is not at the target")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning calls no teardown then.
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for beside in self._beside:
            beside.remove()
        self._beside = []

    def _targets(self) -> dict[str, float]:
        """Targets by the name of what they count, whichever of it turns out to be learned."""
        if self.unit != "bits":
            found = {self.unit: self.target}
        else:
            found = {"weight_bits": self.target, "act_bits": self.target}
        return found if self.act_target is None else found | {"act_bits": self.act_target}

    # Steps of the work ------------------------------------------------------------------------------------------------

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with _misconfigured():
            check_not_all_first_or_last(pl_module)
        learners = learning_quantizers(pl_module)
        begun = None if self._done is None else self._done["begin"]
        start = quantization_start(trainer) if begun is None else begun
        if self._freeze <= start:
            raise MisconfigurationException(
                f"BitBudget: freeze={self.freeze} is step {self._freeze}, but widths are learned from step {start} "
                "on: give a later freeze, or an earlier quantize_from to CPQCallback."
            )
        if self._freeze - start < _FEW_STEPS and not getattr(trainer, "fast_dev_run", False):
            rank_zero_warn(
                f"BitBudget has only {self._freeze - start} steps to learn widths in, from step {start} to the "
                f"freeze at {self._freeze}: they will be rough. A few hundred are better."
            )
        learning = [q for _, q in learners]

        def file_cost() -> WidthCost:
            return byte_cost(exported_part(pl_module), learning, exported_architecture(pl_module))

        with _misconfigured():
            constraints = make_constraints(pl_module, learning, self.target, self.unit, self.act_target, file_cost)
            self._search = WidthSearch(
                learners, constraints, start, self._freeze, trainer.strategy.broadcast, rank_zero_info, rank_zero_warn
            )
        if self._done is not None:
            self._search.load_state_dict(self._done)
            self._done = None
        self._beside = hook_optimizers(trainer, pl_module, [q for _, q in learners], self._search.take_gradient)

    def _fix(self, trainer: Trainer, pl_module: LightningModule) -> None:
        search = self._search
        assert search is not None
        search.fix(run_step(trainer))
        share_with_averages(trainer, pl_module)
        rank_zero_info(f"BitBudget: widths are fixed from step {run_step(trainer)} on.")
        for beside in self._beside:
            beside.rest()
        self._search, self._done = None, search.state_dict()
        self._bests = monitored_bests(trainer)

    # What is shown ----------------------------------------------------------------------------------------------------

    def _values(self, pl_module: LightningModule) -> dict[str, float]:
        values = model_costs(pl_module)
        values["size_bytes"] = packed_size(exported_part(pl_module), exported_architecture(pl_module))
        if self._search is None:
            reached = [] if self._done is None else [(name, 0.0, target) for name, target, _ in self._done["goals"]]
        else:
            search = self._search
            reached = [(goal.name, goal.budget.strength, search.target(goal)) for goal in search.goals]
        for name, strength, target in reached:
            suffix = f"_{name}" if len(reached) > 1 else ""
            values |= {f"penalty{suffix}": strength, f"target{suffix}": target}
        return values


@contextmanager
def _misconfigured() -> Iterator[None]:
    """A budget that a run cannot keep is a mistake in its settings."""
    try:
        yield
    except ValueError as error:
        raise MisconfigurationException(str(error)) from None
