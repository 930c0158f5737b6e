"""The search for widths within a run: where it stands, what a step does to the gates, and the decision."""

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

# Parts of the way from the beginning of learning to the freeze: the target has come down by the first; by the second
# the gates' noise has gone, whole widths are decided, and the gates are moved there.
DESCENT, _SETTLE = 0.7, 0.85
_NOISE_END, _BETA_END = 0.05, 0.2
# A logit could travel this far in all, several times the way from open to shut: gates shut one after the other.
_TRAVEL = 60.0
_FASTEST = 0.5
_PATIENCE = 20


class WidthSearch:
    """Learns the widths of a model's quantizers, from a first step to the freeze.

    Args:
        learners: Quantizers that learn their width, with their names.
        goals: What the widths are held to.
        start: The step from which on they may be learned.
        freeze: The step at which they become fixed.
        agree: Makes a value the first process's on all of them.
        inform: Takes a sentence on what was decided.
        warn: Takes a sentence on what the user should know of.

    Raises:
        ValueError: a target out of reach.
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
        self._start, self._at = start, start
        self._agree = agree
        self._gradients: dict[Quantizer, Tensor] = {}
        self._stepped, self._warned = False, False
        expected = self.gates.expected(1.0, BETA)
        for goal in goals:
            goal.check_reach(self.gates.min_bits, self.gates.max_bits)
            goal.first = goal.budget.cost(expected)

    def progress(self, step: int) -> float:
        """How much of the way from the beginning to the freeze is done at a step, 0 to 1."""
        begin = self._start if self.begin is None else self.begin
        return min(1.0, max(0.0, (step - begin) / max(1, self.freeze - begin)))

    def target(self, goal: Constraint) -> float:
        """Where a goal wants the expected cost now."""
        return goal.scheduled_target(self.progress(self._at) / DESCENT)

    def enter(self, step: int) -> None:
        """Make the gates ready for the forwards of a step; the search begins with the first at which it can."""
        if self.begin is None and self._can_begin(step):
            self.begin = step
        if self.begin is None:
            return
        self._at = step
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
        # A callback that unfreezes the backbone in mid-run: what its bits are worth shows from there on.
        if step < (self._start + self.freeze) / 2:
            return False
        self._warn(
            f"BitBudget: {len(frozen)} of {len(self.names)} quantizers that learn their width, such as {frozen[0]!r}, "
            f"are still frozen at step {step}, halfway to the freeze: the others learn alone, and these follow their "
            "mean. Unfreeze earlier, or give a later freeze."
        )
        return True

    def _annealed(self, step: int) -> tuple[float, float]:
        """Noise and temperature of the gates."""
        done = min(1.0, self.progress(step) / _SETTLE)
        return 1 + (_NOISE_END - 1) * done, BETA + (_BETA_END - BETA) * done

    def take_gradient(self, quantizer: Quantizer, gradient: Tensor | None) -> None:
        """Hold the gradient of a quantizer's logits until the step is left."""
        self._stepped = True
        if gradient is not None and quantizer.log_scale.requires_grad:
            self._gradients[quantizer] = gradient.detach().clone()

    def leave(self, step: int) -> None:
        """Update the gates after a batch, if an optimizer has stepped in it; ``step`` is the next one."""
        stepped, self._stepped = self._stepped, False
        if self.begin is None:
            self._gradients = {}
            return
        if not stepped:
            self._notice_idleness(step)
            return
        # The values that the forward of this step had.
        noise, beta = self._annealed(self._at)
        rate = min(_FASTEST, _TRAVEL / max(1, self.freeze - self.begin))
        progress = self.progress(step)
        if progress < _SETTLE:
            gradients = [self._gradients.get(q) for q in self.quantizers]
            targets = [goal.scheduled_target(progress / DESCENT) for goal in self.goals]
            if not self.gates.step(gradients, targets, rate, noise, beta):
                self._notice_idleness(step)
        else:
            if self.settled is None:
                self.decide(self._at)
            assert self.settled is not None
            self.gates.settle(self.settled, rate, noise, beta)
        self._gradients = {}

    def _notice_idleness(self, step: int) -> None:
        """Warn, once, where the run's step counts on and gates have never been updated."""
        begin = self.begin or 0
        if self.gates.updated or step - begin < max(_PATIENCE, (self.freeze - begin) // 4) or self._warned:
            return
        self._warned = True
        self._warn(
            f"BitBudget: no gate has been updated in the {step - (self.begin or 0)} steps since widths began to be "
            "learned: either the optimizer never runs its step hooks (a wrapper that calls no Optimizer.step of "
            "torch's), or no gradient has been finite. Widths will be decided without having been learned."
        )

    def decide(self, step: int) -> None:
        """Decide whole widths at or below the target: those of the open gates, and the cheapest single changes."""
        noise, beta = self._annealed(step)
        self._name_followers()
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
            moved = net_changes(changes, names)
            changed += moved
            sentences.append(goal.describe(widths, moved))
        # A decision is one process's, whatever rounding may differ between machines.
        self.settled, self.changes = self._agree((widths, changed))
        for sentence in sentences:
            self._inform(sentence)

    def _name_followers(self) -> None:
        updates = self.gates.updates.split(self.gates.rows)
        unknown = [name for name, own in zip(self.names, updates, strict=True) if not own.any()]
        if unknown and self.gates.updated:
            self._warn(
                f"BitBudget: {len(unknown)} of {len(self.names)} quantizers that learn their width, such as "
                f"{unknown[0]!r}, never had a gradient (a teacher, a frozen layer, one that nothing calls): they take "
                "the mean width of the others. To give them widths of their own, set learn_bits to False for them in "
                "CPQConfig(overrides=...)."
            )

    def fix(self, step: int) -> None:
        """Fix the widths in the quantizers."""
        if self.settled is None:
            self.decide(step)
        assert self.settled is not None
        self.gates.fix(self.settled)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, for a checkpoint."""
        return {
            "begin": self.begin,
            "freeze": self.freeze,
            "goals": [(goal.name, goal.target, goal.first) for goal in self.goals],
            "settled": self.settled,
            "changes": self.changes,
            "gates": self.gates.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; a decision stands only for the targets and the freeze that it was made for."""
        self.begin = state["begin"]
        then = [(name, target) for name, target, _ in state["goals"]]
        now = [(goal.name, goal.target) for goal in self.goals]
        if [name for name, _ in then] == [goal.name for goal in self.goals]:
            self.gates.load_state_dict(state["gates"])
            for goal, (_, _, first) in zip(self.goals, state["goals"], strict=True):
                goal.first = first
        if then == now and state["freeze"] == self.freeze:
            self.settled, self.changes = state["settled"], state["changes"]
        else:
            self._inform(
                f"BitBudget: the checkpoint was on its way to {then} with the freeze at step {state['freeze']}, this "
                f"run goes to {now} with the freeze at step {self.freeze}: widths are decided anew."
            )
