"""BitBudget: learns widths under a target cost, and fixes them within the run."""

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
from cpq_lightning.trainer import private
from cpq_lightning.trainer.checks import (
    Bests,
    last_saved,
    monitored_bests,
    monitored_metric,
    quantization_start,
    warn_of_old_bests,
)
from cpq_lightning.trainer.lightning_names import Callback, MisconfigurationException
from cpq_lightning.trainer.loggers import log_widths
from cpq_lightning.trainer.module_parts import exported_architecture, exported_part
from cpq_lightning.trainer.optimizers import hook_optimizers
from cpq_lightning.trainer.progress import run_folder, run_length, run_step
from cpq_lightning.trainer.run_report import validation_metrics
from cpq_lightning.trainer.trajectory import Trajectory
from cpq_lightning.trainer.weight_averaging import share_with_averages

_MIN_STEPS = 60


class BitBudget(Callback):
    """Learn each layer's bit-width under a cost target, and fix the widths within the same run.

    The quantizers must learn their bits: ``CPQConfig(weight_bits=8, min_bits=2, learn_bits=True)``. From the first
    quantized step until the freeze, the gates' logits are trained by the loss and by a penalty ``lambda · cost`` of the
    expected bits (the paper's). ``lambda`` is solved for in each step (ours), such that the expected cost follows a
    path from its initial value to the target. ``CPQConfig(gate_estimator=...)`` selects the estimator of a gate's
    gradient. The noise and the temperature of the gates fall meanwhile (ours).

    Then integer widths are decided, starting with the widths of the open gates. While their cost is over the target,
    the bits with the least saliency per cost are removed. While other bits still fit, those with the most saliency per
    cost are added. The target is a limit: the widths cost at most the target, and as close to it as the search gets.
    The log reports the changes and the unused rest. At ``freeze``, the widths become fixed, and the network trains on
    with them. A run that ends earlier fixes them at its end.

    The logits are trained whenever the module's optimizers step, but are in none of these optimizers. Neither the
    learning rate nor gradient clipping applies to them.

    Logged values: ``cpq/weight_bits`` (the bits in evaluation), ``cpq/expected_weight_bits``, the same two for learned
    activations, ``cpq/size_bytes`` (of the packed file), ``cpq/penalty``, ``cpq/target``. After each validation, every
    layer's bits are logged as a table or as text, if the logger supports it. At the end, ``trajectory.csv`` and
    ``trajectory.png`` are written to the run's folder.

    Args:
        target: Maximal cost of the model: average bits of the weights (first and last layer not counted), bytes of the
            file that ``cpq export --format packed`` writes, including its header, or bit operations of one sample (the
            sum over layers of multiply-accumulates times weight bits times activation bits).
        unit: ``"bits"``, ``"bytes"`` or ``"bops"``.
        act_target: Average bits of learned activations; ``None`` means ``target`` for ``"bits"``. It is required for
            ``"bytes"``, where activations cost nothing, and not allowed for ``"bops"``, which counts weights and
            activations together.
        freeze: When the widths become fixed, as a step count or a fraction of the run; ``None`` means halfway between
            the first quantized step and the end of the run. For ``gate_estimator="concrete"``, whose gradients are
            noisier, 0.8 gave better results.

    Raises:
        ValueError: an argument is out of range.
        MisconfigurationException: before training: no quantizer learns its bits, only first and last layers do, the
            target is out of reach (the message gives the range that can be reached), or the freeze is before
            quantization begins.

    Example:
        >>> BitBudget(target=3.0).unit
        'bits'
    """

    def __init__(
        self,
        target: float,
        *,
        unit: BudgetUnit = "bits",
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
                "act_target cannot be combined with unit='bops', which counts weights and activations together."
            )
        if freeze is not None:
            resolve_point("freeze", freeze, 1)
        self.target, self.act_target, self.freeze = target, act_target, freeze
        self.unit: BudgetUnit = unit
        self._reset()

    def _reset(self) -> None:
        self._search: WidthSearch | None = None
        # Batches started while the search waits for the first batch to give the execution order; None if not waiting.
        self._batches_awaited: int | None = None
        # State of the search after its widths are fixed, for logs and checkpoints.
        self._fixed_state: dict[str, Any] | None = None
        self._freeze = 0
        self._hooks: list[OptimizerHook] = []
        self._bests: Bests = {}
        self._trajectory = Trajectory()
        self._restored: dict[str, Any] = {}

    @property
    def changes(self) -> list[dict[str, Any]]:
        """Widths that were changed to meet the target: name of the quantizer, bits before and after the change."""
        state = self._fixed_state if self._search is None else self._search.state_dict()
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
            "search": self._fixed_state if self._search is None else self._search.state_dict(),
            "bests": self._bests,
            "trajectory": self._trajectory.state_dict(),
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._restored:
            self._fixed_state, self._bests = self._restored["search"], self._restored["bests"]
            self._trajectory.load_state_dict(self._restored["trajectory"])
        if not learning_quantizers(pl_module):
            with _as_misconfiguration():
                sentence, is_problem = explain_nothing_to_learn(pl_module, self._targets(), self._fixed_state)
            (rank_zero_warn if is_problem else rank_zero_info)(sentence)
            return
        if self.freeze is None:
            start, length = quantization_start(trainer), run_length(trainer)
            if not math.isfinite(length):
                raise MisconfigurationException(
                    "BitBudget: freeze=None is halfway through the run, and the length of this run is unknown: give "
                    "freeze as a step count, or give the Trainer max_steps or a loader with a length."
                )
            self._freeze = start + math.ceil(max(0, length - start) / 2)
        else:
            length = run_length(trainer) if isinstance(self.freeze, float) else math.inf
            self._freeze = resolve_point("freeze", self.freeze, length)
        # Only if calibration has failed: then the first batch determines the first and the last layer.
        if auditable(pl_module) and not any(q.execution_index for _, q in quantizers(pl_module)):
            self._batches_awaited = 0
        else:
            self._start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = run_step(trainer)
        if self._batches_awaited is not None:
            # By the second batch, all callbacks have finished the first one.
            self._batches_awaited += 1
            if self._batches_awaited > 1:
                self._batches_awaited = None
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
        begun = self._fixed_state is not None if self._search is None else self._search.begin is not None
        row = begun and self._trajectory.due(run_step(trainer), run_length(trainer))
        if row or (begun and private.logs_now(trainer)):
            values = self._values(pl_module)
            pl_module.log_dict({f"cpq/{name}": float(value) for name, value in values.items()})
            if row:
                self._trajectory.note(run_step(trainer), values, widths_by_name(pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._trajectory.note_metrics(run_step(trainer), validation_metrics(trainer))
        if trainer.is_global_zero:
            log_widths(trainer, widths_by_name(pl_module), run_step(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fast_dev_run = bool(getattr(trainer, "fast_dev_run", False))
        if self._search is not None and self._search.begin is None:
            rank_zero_warn(f"BitBudget: the run ended at step {run_step(trainer)}, before any width was learned.")
        elif self._search is not None:
            if run_step(trainer) < self._freeze and not fast_dev_run:
                rank_zero_warn(
                    f"The run ended at step {run_step(trainer)}, before the freeze at step {self._freeze}: widths are "
                    "fixed now, without further training, and no checkpoint of this run has them: "
                    "trainer.save_checkpoint(path) writes one."
                )
            self._fix(trainer, pl_module)
        if self._fixed_state is None or fast_dev_run:
            return
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        self._trajectory.note(run_step(trainer), self._values(pl_module), widths_by_name(pl_module))
        monitor = monitored_metric(trainer, self._trajectory.metrics)
        self._trajectory.save(folder, last_saved(trainer), monitor)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        warn_of_old_bests(trainer, self._bests, "BitBudget had fixed the widths: it is not at the target")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _targets(self) -> dict[str, float]:
        """Targets by the name of the cost, whether or not such quantizers learn."""
        if self.unit != "bits":
            targets = {self.unit: self.target}
        else:
            targets = {"weight_bits": self.target, "act_bits": self.target}
        return targets if self.act_target is None else targets | {"act_bits": self.act_target}

    # Implementation ---------------------------------------------------------------------------------------------------

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with _as_misconfiguration():
            check_not_all_first_or_last(pl_module)
        learners = learning_quantizers(pl_module)
        restored_begin = None if self._fixed_state is None else self._fixed_state["begin"]
        start = quantization_start(trainer) if restored_begin is None else restored_begin
        if self._freeze <= start:
            raise MisconfigurationException(
                f"BitBudget: freeze={self.freeze} is step {self._freeze}, but widths are learned from step {start} "
                "on: give a later freeze, or an earlier quantize_from to CPQCallback."
            )
        if self._freeze - start < _MIN_STEPS and not getattr(trainer, "fast_dev_run", False):
            rank_zero_warn(
                f"BitBudget has only {self._freeze - start} steps to learn widths in, from step {start} to the "
                f"freeze at {self._freeze}: the widths will be rough. A few hundred steps are better."
            )
        learning = [q for _, q in learners]

        def file_cost() -> WidthCost:
            return byte_cost(exported_part(pl_module), learning, exported_architecture(pl_module))

        with _as_misconfiguration():
            constraints = make_constraints(pl_module, learning, self.target, self.unit, self.act_target, file_cost)
            self._search = WidthSearch(
                learners, constraints, start, self._freeze, trainer.strategy.broadcast, rank_zero_info, rank_zero_warn
            )
        if self._fixed_state is not None:
            self._search.load_state_dict(self._fixed_state)
            self._fixed_state = None
        self._hooks = hook_optimizers(trainer, pl_module, [q for _, q in learners], self._search.take_gradient)

    def _fix(self, trainer: Trainer, pl_module: LightningModule) -> None:
        search = self._search
        assert search is not None
        search.fix(run_step(trainer))
        share_with_averages(trainer, pl_module)
        rank_zero_info(f"BitBudget: widths are fixed from step {run_step(trainer)} on.")
        for hook in self._hooks:
            hook.rest()
        self._search, self._fixed_state = None, search.state_dict()
        self._bests = monitored_bests(trainer)

    # Logged values ----------------------------------------------------------------------------------------------------

    def _values(self, pl_module: LightningModule) -> dict[str, float]:
        values = model_costs(pl_module)
        values["size_bytes"] = packed_size(exported_part(pl_module), exported_architecture(pl_module))
        if self._search is None:
            goals = [] if self._fixed_state is None else self._fixed_state["goals"]
            constraints = [(name, 0.0, target) for name, target, _ in goals]
        else:
            search = self._search
            constraints = [(goal.name, goal.budget.strength, search.target(goal)) for goal in search.goals]
        for name, strength, target in constraints:
            suffix = f"_{name}" if len(constraints) > 1 else ""
            values |= {f"penalty{suffix}": strength, f"target{suffix}": target}
        return values


@contextmanager
def _as_misconfiguration() -> Iterator[None]:
    """Raise a ValueError about a budget as a MisconfigurationException."""
    try:
        yield
    except ValueError as error:
        raise MisconfigurationException(str(error)) from None
