"""BitBudget: learned widths, brought to a target within the run."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from cpq_lightning.attach import learning_quantizers, model_costs, widths_by_name
from cpq_lightning.callbacks._averages import share_with_averages
from cpq_lightning.callbacks._company import quantization_start
from cpq_lightning.callbacks._goals import BudgetUnit, Goal, explain_nothing_to_learn, make_goals, net_changes
from cpq_lightning.callbacks._loggers import log_widths
from cpq_lightning.callbacks._optimizers import beside_optimizers
from cpq_lightning.callbacks._run import run_folder, run_length, run_step
from cpq_lightning.callbacks._trajectory import Trajectory
from cpq_lightning.functional import adjust_widths, resolve_point
from cpq_lightning.functional.dropbits import BETA
from cpq_lightning.nn import Quantizer
from cpq_lightning.optim import Beside, GateTrainer

# Parts of the way from the beginning of learning to the freeze: the target has come down by the first; by the second
# the gates' noise has gone, whole widths are decided, and the gates are moved there.
_DESCENT, _SETTLE = 0.7, 0.85
_NOISE_END, _BETA_END = 0.05, 0.2
# A logit could travel this far in all, several times the way from open to shut: gates shut one after the other.
_TRAVEL = 60.0
_FASTEST = 0.5
_FEW_STEPS = 60


class BitBudget(Callback):
    """Learn each layer's bit-width under a budget that the run keeps, and fix the widths within the same run.

    Needs quantizers that learn, ``CPQConfig(weight_bits=8, min_bits=2, learn_bits=True)``. From the first quantized
    step to the freeze the gates' logits are trained by the loss and by a penalty ``lambda · cost`` of the expected bits
    (the paper's), with ``lambda`` solved for in each step (ours), so that the expected cost follows a path from where
    it starts to the target. Noise and temperature of the gates fall on the way (ours). Then whole widths are decided:
    those of the open gates, and where their cost is off the target, the cheapest changes by single bits bring it there;
    the log names them. At ``freeze`` the widths become fixed, and the chosen network trains on. A run that ends earlier
    fixes them at its end.

    Logits are trained beside the module's optimizers, in their rhythm: they are in none of them, and neither the
    learning rate nor gradient clipping reaches them.

    Logged: ``cpq/weight_bits`` (as evaluation has them), ``cpq/expected_weight_bits``, the same of learned activations,
    ``cpq/size_bytes``, ``cpq/penalty``, ``cpq/target``; after each validation every layer's bits, as a table or as
    text where the logger takes one. The folder of the run gets ``trajectory.csv`` and ``trajectory.png`` at the end.

    Args:
        target: What the model may cost: average bits of the weights (first and last layer aside), bytes of the whole
            model as it ships, or bit operations of one sample (the sum over layers of multiply-accumulates times weight
            bits times activation bits).
        unit: ``"bits"``, ``"bytes"`` or ``"bops"``.
        act_target: Average bits of learned activations; ``None`` is ``target`` in ``"bits"``. Has to be given in
            ``"bytes"``, where activations cost nothing, and left out in ``"bops"``, which count both.
        freeze: When the widths become fixed, as a step count or a fraction of the run.

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: before training: no quantizer that learns, a target out of reach (with the range that
            is within it), or a freeze before quantization begins.

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
        freeze: int | float = 0.8,
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
        resolve_point("freeze", freeze, 1)
        self.target, self.act_target, self.freeze = target, act_target, freeze
        self.unit: BudgetUnit = unit
        self.changes: list[dict[str, Any]] = []
        self._reset()

    def _reset(self) -> None:
        self._begin: int | None = None
        self._freeze, self._at = 0, 0
        self._goals: list[Goal] = []
        self._trainer: GateTrainer | None = None
        self._names: list[str] = []
        self._settled: Tensor | None = None
        self._beside: list[Beside] = []
        self._gradients: dict[Quantizer, Tensor] = {}
        self._stepped = False
        self._trajectory = Trajectory()
        self._restored: dict[str, Any] = {}

    # Hooks, in the order in which they fire ---------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._reset()
            self.changes = []

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def state_dict(self) -> dict[str, Any]:
        return {
            "begin": self._begin,
            "settled": self._settled,
            "changes": self.changes,
            "firsts": [goal.first for goal in self._goals],
            "gates": None if self._trainer is None else self._trainer.state_dict(),
            "trajectory": self._trajectory.state_dict(),
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        learners = learning_quantizers(pl_module)
        self._names, restored = [name for name, _ in learners], self._restored
        if restored:
            self._begin, self.changes = restored["begin"], restored["changes"]
            self._trajectory.load_state_dict(restored["trajectory"])
        if not learners:
            explain_nothing_to_learn(pl_module)
            return
        self._freeze = resolve_point(
            "freeze", self.freeze, run_length(trainer) if isinstance(self.freeze, float) else math.inf
        )
        start = quantization_start(trainer) if self._begin is None else self._begin
        if self._freeze <= start:
            raise MisconfigurationException(
                f"BitBudget: freeze={self.freeze} is step {self._freeze}, but widths are learned from step {start} "
                "on: give a later freeze, or an earlier quantize_from to CPQCallback."
            )
        if self._freeze - start < _FEW_STEPS:
            rank_zero_warn(
                f"BitBudget has only {self._freeze - start} steps to learn widths in, from step {start} to the "
                f"freeze at {self._freeze}: they will be rough. A few hundred are better."
            )
        quantizers_ = [q for _, q in learners]
        self._goals = make_goals(pl_module, quantizers_, self.target, self.unit, self.act_target)
        self._trainer = GateTrainer(quantizers_, [goal.budget for goal in self._goals])
        expected = self._trainer.expected(1.0, BETA)
        for goal in self._goals:
            goal.check_reach(self._trainer.min_bits, self._trainer.max_bits)
            goal.first = goal.budget.cost(expected)
        if restored and restored["gates"] is not None:
            self._trainer.load_state_dict(restored["gates"])
            self._settled = restored["settled"]
            for goal, first in zip(self._goals, restored["firsts"], strict=True):
                goal.first = first
        self._beside = beside_optimizers(trainer, pl_module, quantizers_, self._take_gradient)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._trainer is None:
            return
        step = run_step(trainer)
        if self._begin is None:
            if not all(q.active for q in self._trainer.quantizers):
                return
            self._begin = step
        if step >= self._freeze:
            self._fix(trainer, pl_module)
            return
        self._at = step
        noise, beta = self._annealed(step)
        for quantizer in self._trainer.quantizers:
            quantizer.gates.noise.fill_(noise)
            quantizer.gates.beta.fill_(beta)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._trainer is not None and self._begin is not None and self._stepped:
            self._update(run_step(trainer))
        self._stepped = False
        if self._due(trainer):
            values = self._values(pl_module)
            pl_module.log_dict({f"cpq/{name}": float(value) for name, value in values.items()}, rank_zero_only=True)
            self._trajectory.note(run_step(trainer), values, widths_by_name(pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if "val" in k and v.numel() == 1}
        self._trajectory.note_metrics(run_step(trainer), metrics)
        if trainer.is_global_zero:
            log_widths(trainer, widths_by_name(pl_module), run_step(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._trainer is not None and self._begin is not None:
            rank_zero_warn(
                f"The run ended at step {run_step(trainer)}, before the freeze at step {self._freeze}: widths are "
                "fixed now, with no training behind it."
            )
            self._fix(trainer, pl_module)
        folder = run_folder(trainer)
        if self._begin is None or not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        self._trajectory.note(run_step(trainer), self._values(pl_module), widths_by_name(pl_module))
        self._trajectory.save(folder)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for beside in self._beside:
            beside.remove()
        self._beside = []

    # Steps of the work ------------------------------------------------------------------------------------------------

    def _progress(self, step: int) -> float:
        begin = self._begin or 0
        return min(1.0, max(0.0, (step - begin) / max(1, self._freeze - begin)))

    def _annealed(self, step: int) -> tuple[float, float]:
        """Noise and temperature of the gates."""
        done = min(1.0, self._progress(step) / _SETTLE)
        return 1 + (_NOISE_END - 1) * done, BETA + (_BETA_END - BETA) * done

    def _take_gradient(self, quantizer: Quantizer, gradient: Tensor | None) -> None:
        self._stepped = True
        if gradient is not None:
            self._gradients[quantizer] = gradient.detach().clone()

    def _update(self, step: int) -> None:
        trainer = self._trainer
        assert trainer is not None
        # The values that the forward of this step had.
        noise, beta = self._annealed(self._at)
        rate = min(_FASTEST, _TRAVEL / max(1, self._freeze - (self._begin or 0)))
        progress = self._progress(step)
        if progress < _SETTLE:
            gradients = [self._gradients.get(q, torch.zeros_like(q.gates.logits())) for q in trainer.quantizers]
            targets = [goal.on_the_way(progress / _DESCENT) for goal in self._goals]
            trainer.step(gradients, targets, rate, noise, beta)
        else:
            if self._settled is None:
                self._settled = self._decide(noise, beta)
            trainer.settle(self._settled, rate, noise, beta)
        self._gradients = {}

    def _decide(self, noise: float, beta: float) -> Tensor:
        """Whole widths at the target: those of the open gates, and the cheapest single changes."""
        trainer = self._trainer
        assert trainer is not None
        widths = trainer.decided(noise, beta)
        for goal in self._goals:
            widths, changes = adjust_widths(
                widths,
                trainer.min_bits,
                trainer.max_bits,
                goal.budget.cost,
                goal.target,
                goal.tolerance,
                lambda now, by: trainer.prices(now, by, beta),
            )
            names = [name for name, rows in zip(self._names, trainer.rows, strict=True) for _ in range(rows)]
            moved = net_changes(changes, names)
            self.changes += moved
            rank_zero_info(goal.describe(widths, moved))
        return widths

    def _fix(self, trainer: Trainer, pl_module: LightningModule) -> None:
        gates = self._trainer
        assert gates is not None
        if self._settled is None:
            self._settled = self._decide(*self._annealed(run_step(trainer)))
        # A decision is one rank's, whatever rounding may differ between machines.
        self._settled = trainer.strategy.broadcast(self._settled)
        gates.fix(self._settled)
        share_with_averages(trainer, pl_module)
        rank_zero_info(f"BitBudget: widths are fixed from step {run_step(trainer)} on.")
        self.teardown(trainer, pl_module, "fit")
        self._trainer = None

    # What is shown ----------------------------------------------------------------------------------------------------

    def _due(self, trainer: Trainer) -> bool:
        return self._begin is not None and (
            trainer._logger_connector.should_update_logs or self._trajectory.due(run_step(trainer), run_length(trainer))
        )

    def _values(self, pl_module: LightningModule) -> dict[str, float]:
        values = model_costs(pl_module)
        for goal in self._goals:
            suffix = f"_{goal.name}" if len(self._goals) > 1 else ""
            values[f"penalty{suffix}"] = goal.budget.strength if self._trainer is not None else 0.0
            done = 1.0 if self._trainer is None else self._progress(self._at) / _DESCENT
            values[f"target{suffix}"] = goal.on_the_way(done)
        return values
