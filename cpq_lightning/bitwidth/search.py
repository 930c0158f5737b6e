"""The search for widths during training: its progress, the gate update of each step, and the decision."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from cpq_lightning.bitwidth.constraints import Constraint, net_changes
from cpq_lightning.bitwidth.gate_update import GateUpdate
from cpq_lightning.bitwidth.rounding import adjust_widths
from cpq_lightning.functional.dropbits import BETA
from cpq_lightning.nn.quantizer import Quantizer

log = logging.getLogger(__name__)

# Progress from the begin of the search to the freeze at which the scheduled target reaches the final one, and at which
# the noise has been annealed, integer widths are decided, and the gates start to move there.
DESCENT, _SETTLE = 0.7, 0.85
_NOISE_END, _BETA_END = 0.05, 0.2
# Total distance that a logit could move, several times that from open to closed: gates close one after the other.
_TOTAL_DISTANCE = 60.0
_MAX_RATE = 0.5
_PATIENCE = 20


class WidthSearch:
    """Learns the widths of a model's quantizers, from a first step to the freeze.

    Args:
        learners: Quantizers that learn their width, with their names.
        goals: The constraints on the widths.
        start: The first step at which widths may be learned.
        freeze: The step at which the widths are fixed.
        agree: Broadcasts a value from the first process to all processes.
        inform: Logs a sentence on the decision.
        warn: Warns the user with a sentence.

    Raises:
        ValueError: A target is out of reach.
    """

    def __init__(
        self,
        learners: Sequence[tuple[str, Quantizer]],
        goals: list[Constraint],
        start: int,
        freeze: int,
        agree: Callable[[Any], Any] = lambda value: value,
        inform: Callable[[str], None] = log.info,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        self._inform, self._warn = inform, warn
        self.names = [name for name, _ in learners]
        self.quantizers = [quantizer for _, quantizer in learners]
        self.goals = goals
        self.gates = GateUpdate(self.quantizers, [goal.budget for goal in goals])
        self.begin: int | None = None
        self.freeze = freeze
        self.settled: Tensor | None = None
        self.changes: list[dict[str, Any]] = []
        self._start, self._step = start, start
        self._agree = agree
        self._gradients: dict[Quantizer, Tensor] = {}
        self._optimizer_stepped, self._warned = False, False
        expected = self.gates.expected(1.0, BETA)
        for goal in goals:
            goal.check_reach(self.gates.min_bits, self.gates.max_bits)
            goal.first = goal.budget.cost(expected)

    def progress(self, step: int) -> float:
        """Progress from the begin of the search to the freeze at ``step``, 0 to 1."""
        begin = self._start if self.begin is None else self.begin
        return min(1.0, max(0.0, (step - begin) / max(1, self.freeze - begin)))

    def target(self, goal: Constraint) -> float:
        """The scheduled target of a constraint at the current step."""
        return goal.scheduled_target(self.progress(self._step) / DESCENT)

    def enter(self, step: int) -> None:
        """Set the gates' noise and temperature for the forwards of ``step``.

        The search begins with the first step at which the quantizers are active and trained.
        """
        if self.begin is None and self._can_begin(step):
            self.begin = step
        if self.begin is None:
            return
        self._step = step
        noise, beta = self._annealed(step)
        for quantizer in self.quantizers:
            quantizer.gates.noise.fill_(noise)
            quantizer.gates.beta.fill_(beta)

    def _can_begin(self, step: int) -> bool:
        if not all(q.active for q in self.quantizers):
            return False
        frozen = [name for name, q in zip(self.names, self.quantizers, strict=True) if not q.log_scale.requires_grad]
        if not frozen:
            return True
        # A callback may unfreeze the backbone during the run: the saliency of its bits is measured from then on.
        if step < (self._start + self.freeze) / 2:
            return False
        self._warn(
            f"BitBudget: {len(frozen)} of {len(self.names)} quantizers that learn their width, such as {frozen[0]!r}, "
            f"are still frozen at step {step}, halfway to the freeze: the others learn alone, and these follow their "
            "mean. Unfreeze earlier, or give a later freeze."
        )
        return True

    def _annealed(self, step: int) -> tuple[float, float]:
        """Noise and temperature of the gates at ``step``."""
        done = min(1.0, self.progress(step) / _SETTLE)
        return 1 + (_NOISE_END - 1) * done, BETA + (_BETA_END - BETA) * done

    def take_gradient(self, quantizer: Quantizer, gradient: Tensor | None) -> None:
        """Keep the gradient of a quantizer's logits until :meth:`leave`."""
        self._optimizer_stepped = True
        if gradient is not None and quantizer.log_scale.requires_grad:
            self._gradients[quantizer] = gradient.detach().clone()

    def leave(self, step: int) -> None:
        """Update the gates after a batch if an optimizer has stepped; ``step`` is the next step."""
        optimizer_stepped, self._optimizer_stepped = self._optimizer_stepped, False
        if self.begin is None:
            self._gradients = {}
            return
        if not optimizer_stepped:
            self._warn_if_idle(step)
            return
        # The values used by the forward of this step.
        noise, beta = self._annealed(self._step)
        rate = min(_MAX_RATE, _TOTAL_DISTANCE / max(1, self.freeze - self.begin))
        progress = self.progress(step)
        if progress < _SETTLE:
            gradients = [self._gradients.get(q) for q in self.quantizers]
            targets = [goal.scheduled_target(progress / DESCENT) for goal in self.goals]
            if not self.gates.step(gradients, targets, rate, noise, beta):
                self._warn_if_idle(step)
        else:
            if self.settled is None:
                self.decide(self._step)
            assert self.settled is not None
            self.gates.settle(self.settled, rate, noise, beta)
        self._gradients = {}

    def _warn_if_idle(self, step: int) -> None:
        """Warn, once, if steps pass and no gate has been updated."""
        begin = self.begin or 0
        if self.gates.updated or step - begin < max(_PATIENCE, (self.freeze - begin) // 4) or self._warned:
            return
        self._warned = True
        self._warn(
            f"BitBudget: no gate has been updated in the {step - (self.begin or 0)} steps since widths began to be "
            "learned: either the optimizer does not run its step hooks (a wrapper that never calls torch's "
            "Optimizer.step), or no gradient was finite. Widths will be decided without having been learned."
        )

    def decide(self, step: int) -> None:
        """Decide integer widths at or below the target: those of the open gates, then the cheapest one-bit changes."""
        noise, beta = self._annealed(step)
        self._warn_of_followers()
        widths = self.gates.decided(noise, beta)
        changed: list[dict[str, Any]] = []
        sentences = []
        for goal in self.goals:
            widths, changes = adjust_widths(
                widths,
                self.gates.min_bits,
                self.gates.max_bits,
                goal.budget.cost,
                goal.target,
                goal.tolerance,
                lambda now, by: self.gates.prices(now, by, beta),
                follows=self.gates.updates == 0,
            )
            names = [name for name, rows in zip(self.names, self.gates.rows, strict=True) for _ in range(rows)]
            net = net_changes(changes, names)
            changed += net
            sentences.append(goal.describe(widths, net))
        # All processes take the decision of the first one, since rounding may differ between machines.
        self.settled, self.changes = self._agree((widths, changed))
        for sentence in sentences:
            self._inform(sentence)

    def _warn_of_followers(self) -> None:
        updates = self.gates.updates.split(self.gates.rows)
        unknown = [name for name, counts in zip(self.names, updates, strict=True) if not counts.any()]
        if unknown and self.gates.updated:
            self._warn(
                f"BitBudget: {len(unknown)} of {len(self.names)} quantizers that learn their width, such as "
                f"{unknown[0]!r}, never had a gradient (a teacher, a frozen layer, a layer that nothing calls): they "
                "take the mean width of the others. To choose their widths, set learn_bits=False for them in "
                "CPQConfig(overrides=...)."
            )

    def fix(self, step: int) -> None:
        """Fix the widths in the quantizers."""
        if self.settled is None:
            self.decide(step)
        assert self.settled is not None
        self.gates.fix(self.settled)

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs, for a checkpoint."""
        return {
            "begin": self.begin,
            "freeze": self.freeze,
            "goals": [(goal.name, goal.target, goal.first) for goal in self.goals],
            "settled": self.settled,
            "changes": self.changes,
            "gates": self.gates.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`. A decision is restored only if the targets and the freeze are the same."""
        self.begin = state["begin"]
        previous = [(name, target) for name, target, _ in state["goals"]]
        now = [(goal.name, goal.target) for goal in self.goals]
        if [name for name, _ in previous] == [goal.name for goal in self.goals]:
            self.gates.load_state_dict(state["gates"])
            for goal, (_, _, first) in zip(self.goals, state["goals"], strict=True):
                goal.first = first
        if previous == now and state["freeze"] == self.freeze:
            self.settled, self.changes = state["settled"], state["changes"]
        else:
            self._inform(
                f"BitBudget: the checkpoint has the targets {previous} and the freeze at step {state['freeze']}, this "
                f"run has {now} and the freeze at step {self.freeze}: widths are decided again."
            )
