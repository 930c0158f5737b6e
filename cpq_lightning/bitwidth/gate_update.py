"""Learned widths: the update of all gates of a model, under budgets that it keeps step by step.

The logits move by what the loss says of them (:mod:`cpq_lightning.bitwidth.gate_statistics`) and by the gradient of a
penalty ``lambda · cost(expected bits)``, as the paper has it (arXiv 2109.02100). Here lambda is not chosen: each update
solves for the one with which the expected cost arrives where the schedule wants it (ours), so that a run can neither
overshoot its target nor stop short of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpq_lightning.bitwidth.cost import WidthCost
from cpq_lightning.bitwidth.gate_statistics import ConcreteStatistics, CurvatureStatistics, Values
from cpq_lightning.config import GateEstimator
from cpq_lightning.functional.dropbits import expected_bits, expected_slope, logit_of, open_gates, open_probability
from cpq_lightning.nn.quantizer import Quantizer

_VALUES: dict[GateEstimator, type[Values]] = {"curvature": CurvatureStatistics, "concrete": ConcreteStatistics}
# Of the strength that is shown.
_MOMENTUM = 0.9
_ROUNDS = 50
# While widths are learned a logit stays where its gate is open with a probability between these.
_REACH = (0.02, 0.98)
# A gate that follows others is open with at least this probability, and shut with at least this one.
_SHUT = 1e-3
# Beyond its threshold by this a gate is 0 or 1 for certain, at the noise and temperature that learning ends with.
_CERTAIN = 1.5


@dataclass
class Budget:
    """One cost that is held to a target.

    Attributes:
        cost: Of the widths of all rows.
        strength: The penalty's strength ``lambda``, a running mean over updates: what a unit of the cost has to be
            worth, in the unit of the loss where gates have its gradient, of its square by the batch where they learn by
            curvature.
    """

    cost: WidthCost
    strength: float = 0.0


class GateUpdate:
    """Moves the logits of learned gates, all at once and at a rate of their own.

    Rows are the quantizers' widths, one for each or one a channel, in order; ``theta`` holds a column of logits for
    each. With ``m`` the gradient of the loss and ``s`` its unit
    (:class:`~cpq_lightning.bitwidth.gate_statistics.Values`), and ``c`` the gradient of a cost of the expected bits, an
    update is

        theta <- theta - rate · clip((m + lambda c) / s, -1, 1)

    so a gate closes where what it saves, at the price lambda, outweighs what it is worth to the loss; neither the
    share of a layer in the model nor the optimizer of the weights sets its pace. ``lambda`` is solved for.

    Where no gradient came in a step (its optimizer did not step, its layer is frozen), running means stay as they were.
    Of a row that never had one (a teacher under ``no_grad``, a layer that nothing calls) nothing is known: it follows
    the mean width of the others, by what it costs, and so neither takes bits from them nor leaves them any.

    Args:
        quantizers: Those whose widths are learned.
        budgets: Costs of the rows' widths; a row belongs to at most one of them.

    Raises:
        ValueError: gates of several estimators.
    """

    def __init__(self, quantizers: Sequence[Quantizer], budgets: Sequence[Budget]) -> None:
        self.quantizers = list(quantizers)
        self.budgets = list(budgets)
        self.counts = [q.bits - q.min_bits for q in self.quantizers]
        self.rows = [q.gates.rows for q in self.quantizers]
        self.min_bits = self._per_row([float(q.min_bits) for q in self.quantizers])
        count = self._per_row([float(c) for c in self.counts])
        self.max_bits = self.min_bits + count
        self.exists = torch.arange(max(self.counts))[:, None] < count
        self.estimator = self._common_estimator()
        self.values = _VALUES[self.estimator](tuple(self.exists.shape))
        self.updates = torch.zeros(len(self.min_bits), dtype=torch.float64)

    def _common_estimator(self) -> GateEstimator:
        found: set[GateEstimator] = {q.gates.estimator for q in self.quantizers}
        if len(found) > 1:
            raise ValueError(
                f"gate_estimator must be the same for all quantizers that learn their width, whose bits compete; got "
                f"{sorted(found)}: attach all parts of the module with one."
            )
        return next(iter(found))

    @property
    def updated(self) -> bool:
        """Whether any gate has ever had a gradient."""
        return bool(self.updates.any())

    def _per_row(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).repeat_interleave(torch.tensor(self.rows))

    def _collect(self, values: Sequence[Tensor]) -> Tensor:
        """Values of each quantizer's gates as one matrix on the host, a column a row of gates."""
        matrix = torch.zeros(self.exists.shape, dtype=torch.float64)
        # One copy from the device for all of them.
        flat = torch.cat([v.detach().reshape(-1) for v in values]).double().cpu()
        at, column = 0, 0
        for value, count, rows in zip(values, self.counts, self.rows, strict=True):
            own = flat[at : at + value.numel()].reshape(-1, rows)
            matrix[:count, column : column + rows] = own[:count]
            at, column = at + value.numel(), column + rows
        return matrix

    def theta(self) -> Tensor:
        """The logits, shape (gates, rows), float64; 0 where a row has fewer gates."""
        return self._collect([q.gates.logits(c) for q, c in zip(self.quantizers, self.counts, strict=True)])

    @torch.no_grad()
    def write(self, theta: Tensor) -> None:
        """Set the logits."""
        column = 0
        for q, count, rows in zip(self.quantizers, self.counts, self.rows, strict=True):
            logits = q.gates.logits(count)
            logits.copy_(theta[:count, column : column + rows])
            column += rows

    def probabilities(self, theta: Tensor, noise: float, beta: float) -> Tensor:
        """``P(z > 0)``, 0 where a row has no such gate."""
        return torch.where(self.exists, open_probability(theta, noise, beta), 0.0)

    def expected(self, noise: float, beta: float) -> Tensor:
        """Expected widths, shape (rows,)."""
        return expected_bits(self.probabilities(self.theta(), noise, beta), self.min_bits)

    def decided(self, noise: float, beta: float) -> Tensor:
        """Widths as evaluation has them, shape (rows,)."""
        return self.min_bits + open_gates(self.probabilities(self.theta(), noise, beta)).sum(0)

    @torch.no_grad()
    def step(
        self, gradients: Sequence[Tensor | None], targets: Sequence[float], rate: float, noise: float, beta: float
    ) -> bool:
        """Update all logits, unless a gradient is not finite.

        Args:
            gradients: Of the loss, in each quantizer's logits; ``None`` where there is none.
            targets: What each budget's expected cost shall be after the update.
            rate: Largest move of a logit.
            noise: How much of the gates' noise is left.
            beta: Temperature of the gates.

        Returns:
            Whether it was done.
        """
        came = self._per_row([0.0 if g is None else 1.0 for g in gradients])
        zeros = (torch.zeros_like(q.gates.logits()) for q in self.quantizers)
        gradient = self._collect([z if g is None else g for g, z in zip(gradients, zeros, strict=True)])
        if not gradient.isfinite().all():
            return False
        self.updates += self.values.update(gradient, came)
        known = self.updates > 0
        theta = self._following(self.theta(), known, rate, noise, beta)
        # A gate that is all but decided stays where noise still reaches it: it can come back.
        low, high = (_logit_at(p, noise, beta) for p in _REACH)
        low, high = torch.minimum(theta, low), torch.maximum(theta, high)
        open_now = self.probabilities(theta, noise, beta)
        slope = expected_slope(open_now, noise)
        mean, scale = self.values.of(open_now, noise)
        widths = expected_bits(open_now, self.min_bits)

        def moved(strength: float, price: Tensor) -> Tensor:
            move = ((mean + strength * price) / scale).clamp(-1, 1)
            return torch.minimum(torch.maximum(theta - rate * move * known, low), high)

        new = moved(0.0, slope)
        for budget, target in zip(self.budgets, targets, strict=True):
            unit = budget.cost.gradient(widths)
            price = slope * unit

            def cost(strength: float, budget: Budget = budget, price: Tensor = price, mine: Tensor = unit > 0) -> float:
                expected = expected_bits(self.probabilities(moved(strength, price), noise, beta), self.min_bits)
                return budget.cost(torch.where(mine, expected, widths))

            strength = _solve(cost, target, _reach(mean, scale, price * known))
            budget.strength += (strength - budget.strength) * (1 - _MOMENTUM)
            new = torch.where(unit > 0, moved(strength, price), new)
        self.write(new)
        return True

    def _following(self, theta: Tensor, known: Tensor, rate: float, noise: float, beta: float) -> Tensor:
        """Logits with those of the unknown rows moved towards the mean width of the known ones."""
        if known.all() or not known.any():
            return theta
        widths = expected_bits(self.probabilities(theta, noise, beta), self.min_bits)
        for budget in self.budgets:
            unit = budget.cost.gradient(widths)
            share = unit * known
            if not share.any():
                continue
            mean = (share * widths).sum() / share.sum()
            gate = torch.arange(len(self.exists))[:, None]
            wanted = (mean.clamp(self.min_bits, self.max_bits) - self.min_bits - gate).clamp(_SHUT, 1 - _SHUT)
            moved = theta + (logit_of(wanted, noise, beta) - theta).clamp(-rate, rate)
            theta = torch.where(~known & (unit > 0), moved, theta)
        return theta

    @torch.no_grad()
    def settle(self, widths: Tensor, rate: float, noise: float, beta: float) -> None:
        """Move all logits to where gates are certainly open up to ``widths``, shape (rows,), and shut behind them."""
        wanted = torch.arange(len(self.exists))[:, None] < widths - self.min_bits
        threshold = _logit_at(0.5, noise, beta)
        goal = torch.where(wanted, threshold + _CERTAIN, threshold - _CERTAIN)
        theta = self.theta()
        self.write(theta + (goal - theta).clamp(-rate, rate))

    def prices(self, widths: Tensor, by: int, beta: float) -> Tensor:
        """What a change of each width by +1 or -1 costs the network: what the bit is worth, of rows whose loss has told
        that, and of others how far the gate's logit is from its threshold.
        """
        gate = (widths - self.min_bits).long() - (1 if by < 0 else 0)
        gate = gate.clamp(0, len(self.exists) - 1)[None]
        distance = (self.theta().gather(0, gate)[0] - _logit_at(0.5, 1.0, beta)).abs()
        worth = self.values.worth()
        return distance if worth is None else torch.where(self.updates > 0, -by * worth.gather(0, gate)[0], distance)

    @torch.no_grad()
    def fix(self, widths: Tensor) -> None:
        """Fix the quantizers' widths, shape (rows,)."""
        for quantizer, own in zip(self.quantizers, widths.long().split(self.rows), strict=True):
            quantizer.fix_widths(own.tolist())

    def state_dict(self) -> dict[str, Any]:
        """The running means and the strengths, for a checkpoint."""
        return {
            "estimator": self.estimator,
            "values": self.values.state_dict(),
            "updates": self.updates.clone(),
            "strengths": [budget.strength for budget in self.budgets],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        # Means of another estimator's gradients tell nothing here, and are learned anew.
        if state.get("estimator") == self.estimator:
            self.values.load_state_dict(state["values"])
            self.updates = state["updates"].clone()
        for budget, strength in zip(self.budgets, state["strengths"], strict=True):
            budget.strength = strength


def _logit_at(probability: float, noise: float, beta: float) -> Tensor:
    return logit_of(torch.tensor(probability, dtype=torch.float64), noise, beta)


def _reach(mean: Tensor, scale: Tensor, price: Tensor) -> float:
    """A strength at which every gate that matters to the cost moves as fast as it can."""
    matters = price > 1e-9 * price.max()
    return float(((mean.abs() + scale) / price)[matters].max()) if matters.any() else 0.0


def _solve(cost: Callable[[float], float], target: float, reach: float) -> float:
    """The strength up to ``reach``, of either sign, with ``cost(strength) = target``: the cost falls with it."""
    low, high = -reach, reach
    # Of several that do, where all gates are decided, the one nearest to none.
    if abs(cost(0.0) - target) < 1e-6 * abs(target):
        return 0.0
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        if cost(middle) > target:
            low = middle
        else:
            high = middle
    return high
