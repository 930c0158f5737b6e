"""Learned widths: the update of all gate logits of a model, under budgets that every update meets.

The logits move by the gradient of the loss (:mod:`cpq_lightning.bitwidth.gate_statistics`) and by that of a penalty
``lambda · cost(expected bits)``, as in the paper (arXiv 2109.02100). Here ``lambda`` is no hyperparameter: each update
solves for the value at which the expected cost meets the scheduled target (ours), so that a run neither overshoots nor
misses its target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpq_lightning.bitwidth.cost import WidthCost
from cpq_lightning.bitwidth.gate_statistics import ConcreteStatistics, CurvatureStatistics, GateStatistics
from cpq_lightning.config import GateEstimator
from cpq_lightning.functional.dropbits import expected_bits, expected_slope, logit_of, open_gates, open_probability
from cpq_lightning.nn.quantizer import Quantizer

_STATISTICS: dict[GateEstimator, type[GateStatistics]] = {
    "curvature": CurvatureStatistics,
    "concrete": ConcreteStatistics,
}
# Decay rate of the running mean of the reported strength.
_MOMENTUM = 0.9
_BISECTION_STEPS = 50
# While widths are learned, the probability of an open gate stays in this range.
_PROBABILITY_RANGE = (0.02, 0.98)
# The minimum probability of an open and of a closed gate in rows that follow the mean of the others.
_MIN_P = 1e-3
# A logit this far from its threshold makes the gate exactly 0 or 1, at the final noise and temperature.
_MARGIN = 1.5


@dataclass
class Budget:
    """One cost with a target.

    Attributes:
        cost: The cost of the widths of all rows.
        strength: The penalty's strength ``lambda``, a running mean over updates: the saliency at which a bit pays for
            one unit of cost. Its unit is that of the loss with the estimator ``"concrete"``, and that of the squared
            loss of a batch with ``"curvature"``.
    """

    cost: WidthCost
    strength: float = 0.0


class GateUpdate:
    """Updates the logits of all learned gates together, with a separate learning rate.

    A row is one bit width: that of a quantizer, or of one of its channels, in order. ``theta`` holds one column of
    logits for each row. With ``m`` the gradient of the loss and ``s`` its unit
    (:class:`~cpq_lightning.bitwidth.gate_statistics.GateStatistics`), and ``c`` the gradient of the cost of the
    expected bits, an update is

        theta <- theta - rate · clip((m + lambda c) / s, -1, 1)

    A gate closes where the cost that it saves, at the price ``lambda``, outweighs the saliency of its bit. The speed
    depends neither on the size of a layer nor on the optimizer of the weights. Each update solves for ``lambda``.

    A row without a gradient in a step (its optimizer did not step, its layer is frozen) keeps its running means. A row
    that never had a gradient (a teacher under ``no_grad``, a layer that nothing calls) follows the mean width of the
    other rows, weighted by cost: it neither takes bits from them nor leaves them any.

    Args:
        quantizers: The quantizers that learn their width.
        budgets: Costs of the rows' widths; a row belongs to at most one of them.

    Raises:
        ValueError: The quantizers use different gate estimators.
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
        self.values = _STATISTICS[self.estimator](tuple(self.exists.shape))
        self.updates = torch.zeros(len(self.min_bits), dtype=torch.float64)

    def _common_estimator(self) -> GateEstimator:
        estimators: set[GateEstimator] = {q.gates.estimator for q in self.quantizers}
        if len(estimators) > 1:
            raise ValueError(
                "gate_estimator must be the same for all quantizers that learn their width, since their bits compete; "
                f"got {sorted(estimators)}: attach all parts of the module with the same one."
            )
        return next(iter(estimators))

    @property
    def updated(self) -> bool:
        """Whether any gate has had a gradient."""
        return bool(self.updates.any())

    def _per_row(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).repeat_interleave(torch.tensor(self.rows))

    def _collect(self, values: Sequence[Tensor]) -> Tensor:
        """The gate values of all quantizers as one matrix on the host, one column for each row."""
        matrix = torch.zeros(self.exists.shape, dtype=torch.float64)
        # A single copy from the device.
        flat = torch.cat([v.detach().reshape(-1) for v in values]).double().cpu()
        offset, column = 0, 0
        for value, count, rows in zip(values, self.counts, self.rows, strict=True):
            part = flat[offset : offset + value.numel()].reshape(-1, rows)
            matrix[:count, column : column + rows] = part[:count]
            offset, column = offset + value.numel(), column + rows
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
        """``P(z > 0)``; 0 where a row has fewer gates."""
        return torch.where(self.exists, open_probability(theta, noise=noise, beta=beta), 0.0)

    def expected(self, noise: float, beta: float) -> Tensor:
        """Expected widths, shape (rows,)."""
        return expected_bits(self.probabilities(self.theta(), noise, beta), self.min_bits)

    def decided(self, noise: float, beta: float) -> Tensor:
        """The widths in evaluation, shape (rows,)."""
        return self.min_bits + open_gates(self.probabilities(self.theta(), noise, beta)).sum(0)

    @torch.no_grad()
    def step(
        self, gradients: Sequence[Tensor | None], targets: Sequence[float], rate: float, noise: float, beta: float
    ) -> bool:
        """Update all logits, unless a gradient is not finite.

        Args:
            gradients: Gradient of the loss in each quantizer's logits; ``None`` if it has none.
            targets: The expected cost of each budget after the update.
            rate: Maximum change of a logit.
            noise: Scale of the gates' noise, from 1 down to nearly 0.
            beta: Temperature of the gates.

        Returns:
            Whether the logits were updated.
        """
        has_gradient = self._per_row([0.0 if g is None else 1.0 for g in gradients])
        zeros = (torch.zeros_like(q.gates.logits()) for q in self.quantizers)
        gradient = self._collect([z if g is None else g for g, z in zip(gradients, zeros, strict=True)])
        if not gradient.isfinite().all():
            return False
        self.updates += self.values.update(gradient, has_gradient)
        known = self.updates > 0
        theta = self._following(self.theta(), known, rate, noise, beta)
        # A nearly decided gate stays within reach of the noise, so that the decision can be reversed.
        low, high = (_logit_at(p, noise, beta) for p in _PROBABILITY_RANGE)
        low, high = torch.minimum(theta, low), torch.maximum(theta, high)
        open_now = self.probabilities(theta, noise, beta)
        slope = expected_slope(open_now, noise)
        mean, scale = self.values.of(open_now, noise)
        widths = expected_bits(open_now, self.min_bits)

        def updated(strength: float, price: Tensor) -> Tensor:
            move = ((mean + strength * price) / scale).clamp(-1, 1)
            return torch.minimum(torch.maximum(theta - rate * move * known, low), high)

        new = updated(0.0, slope)
        for budget, target in zip(self.budgets, targets, strict=True):
            unit = budget.cost.gradient(widths)
            price = slope * unit

            def cost(
                strength: float, budget: Budget = budget, price: Tensor = price, counted: Tensor = unit > 0
            ) -> float:
                expected = expected_bits(self.probabilities(updated(strength, price), noise, beta), self.min_bits)
                return budget.cost(torch.where(counted, expected, widths))

            strength = _solve(cost, target, _max_strength(mean, scale, price * known))
            budget.strength += (strength - budget.strength) * (1 - _MOMENTUM)
            new = torch.where(unit > 0, updated(strength, price), new)
        self.write(new)
        return True

    def _following(self, theta: Tensor, known: Tensor, rate: float, noise: float, beta: float) -> Tensor:
        """The logits ``theta``, those of rows without statistics moved towards the mean width of the others."""
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
            wanted = (mean.clamp(self.min_bits, self.max_bits) - self.min_bits - gate).clamp(_MIN_P, 1 - _MIN_P)
            updated = theta + (logit_of(wanted, noise=noise, beta=beta) - theta).clamp(-rate, rate)
            theta = torch.where(~known & (unit > 0), updated, theta)
        return theta

    @torch.no_grad()
    def settle(self, widths: Tensor, rate: float, noise: float, beta: float) -> None:
        """Move all logits by at most ``rate``, so that the gates up to ``widths``, shape (rows,), become open with
        certainty and the others closed.
        """
        is_open = torch.arange(len(self.exists))[:, None] < widths - self.min_bits
        threshold = _logit_at(0.5, noise, beta)
        final = torch.where(is_open, threshold + _MARGIN, threshold - _MARGIN)
        theta = self.theta()
        self.write(theta + (final - theta).clamp(-rate, rate))

    def prices(self, widths: Tensor, by: int, beta: float) -> Tensor:
        """The price to the network of a change of each width by ``by``, +1 or -1, shape (rows,).

        The price is the saliency of the bit, negative for a bit that is added. For a row without a measured saliency it
        is the distance of the gate's logit from its threshold.
        """
        gate = (widths - self.min_bits).long() - (1 if by < 0 else 0)
        gate = gate.clamp(0, len(self.exists) - 1)[None]
        distance = (self.theta().gather(0, gate)[0] - _logit_at(0.5, 1.0, beta)).abs()
        saliency = self.values.saliency()
        if saliency is None:
            return distance
        return torch.where(self.updates > 0, -by * saliency.gather(0, gate)[0], distance)

    @torch.no_grad()
    def fix(self, widths: Tensor) -> None:
        """Fix the quantizers' widths, shape (rows,)."""
        for quantizer, chosen in zip(self.quantizers, widths.long().split(self.rows), strict=True):
            quantizer.fix_widths(chosen.tolist())

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
        # The statistics of another estimator do not apply, and are measured again.
        if state.get("estimator") == self.estimator:
            self.values.load_state_dict(state["values"])
            self.updates = state["updates"].clone()
        for budget, strength in zip(self.budgets, state["strengths"], strict=True):
            budget.strength = strength


def _logit_at(probability: float, noise: float, beta: float) -> Tensor:
    return logit_of(torch.tensor(probability, dtype=torch.float64), noise=noise, beta=beta)


def _max_strength(mean: Tensor, scale: Tensor, price: Tensor) -> float:
    """A strength at which every gate with an effect on the cost moves at the maximum rate."""
    relevant = price > 1e-9 * price.max()
    return float(((mean.abs() + scale) / price)[relevant].max()) if relevant.any() else 0.0


def _solve(cost: Callable[[float], float], target: float, maximum: float) -> float:
    """The strength in [-maximum, maximum] with ``cost(strength) = target``, by bisection of the decreasing cost."""
    low, high = -maximum, maximum
    # If all gates are decided there are several solutions: prefer no penalty.
    if abs(cost(0.0) - target) < 1e-6 * abs(target):
        return 0.0
    for _ in range(_BISECTION_STEPS):
        middle = (low + high) / 2
        if cost(middle) > target:
            low = middle
        else:
            high = middle
    return high
