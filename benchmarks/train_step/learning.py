"""The search for widths that BitBudget runs beside an optimizer, without a Trainer."""

from __future__ import annotations

from torch import nn

from cpq_lightning.bitwidth.constraints import make_constraints
from cpq_lightning.bitwidth.model_cost import learning_quantizers
from cpq_lightning.bitwidth.search import WidthSearch

TARGET = 4.0
# So far off that a benchmark stays in the middle of the way.
_FREEZE = 10**6


class Learning:
    """What a training step with learned widths does besides its forward and backward.

    Args:
        model: A calibrated model with widths to learn.
    """

    def __init__(self, model: nn.Module) -> None:
        self.learners = [quantizer for _, quantizer in learning_quantizers(model)]
        constraints = make_constraints(model, self.learners, TARGET, "bits")
        self._search = WidthSearch(learning_quantizers(model), constraints, 0, _FREEZE)
        self._step = 0

    def enter(self) -> None:
        """Before the forward."""
        self._search.enter(self._step)

    def leave(self) -> None:
        """After the optimizer's step."""
        for quantizer in self.learners:
            logit = quantizer.gates.logit
            assert logit is not None
            self._search.take_gradient(quantizer, logit.grad)
        self._step += 1
        self._search.leave(self._step)

    def fix(self) -> None:
        """Decide the widths, as at the freeze."""
        self._search.fix(self._step)
