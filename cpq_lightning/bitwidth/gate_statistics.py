"""What the loss says of each gate: running means over steps, for both estimators of gates."""

from __future__ import annotations

import torch
from torch import Tensor

from cpq_lightning.functional.dropbits import expected_slope

# Adam's running means, with a shorter memory for the square: gates that are nearly decided have rare gradients.
_MOMENTUM, _VARIANCE = 0.9, 0.99
# What bits are worth changes slowly, and each step tells it anew.
_MEMORY = 0.98
# What is worth no more than this is worth nothing: what nothing depends on, for which backward hands over less.
_NOTHING, _TINY = 1e-28, 1e-36


class Values:
    """Running means of what gates hand over, as matrices with a column of gates for each row of widths.

    Args:
        shape: Gates and rows.
    """

    _NAMES: tuple[str, ...] = ()

    def __init__(self, shape: tuple[int, ...]) -> None:
        for name in self._NAMES:
            setattr(self, name, torch.zeros(shape, dtype=torch.float64))

    def update(self, gradient: Tensor, came: Tensor) -> Tensor:
        """Take a step's gradients; ``came``, one value a row, is 0 where there was none.

        Returns:
            Of which rows they tell anything, bool.
        """
        raise NotImplementedError

    def of(self, open_now: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        """The loss's gradient in each logit, and the unit that a logit's move by it is measured in.

        Args:
            open_now: Probability of each gate to be open.
            noise: How much of the gates' noise is left.
        """
        raise NotImplementedError

    def worth(self) -> Tensor | None:
        """What each bit is worth to the loss; ``None`` of gradients that do not tell."""
        return None

    def state_dict(self) -> dict[str, Tensor]:
        """The running means, for a checkpoint."""
        return {name: getattr(self, name).clone() for name in self._NAMES}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`."""
        for name in self._NAMES:
            setattr(self, name, state[name].clone())


class ConcreteStatistics(Values):
    """Of gates with the estimator ``"concrete"``: means ``m`` of the gradient through what was drawn and ``v`` of its
    square, as Adam has them. A logit moves by ``m / sqrt(v)``.
    """

    _NAMES = ("mean", "square", "count")
    mean: Tensor
    square: Tensor
    count: Tensor

    def update(self, gradient: Tensor, came: Tensor) -> Tensor:
        self.count += came
        self.mean.lerp_(gradient, (came * (1 - _MOMENTUM)).expand_as(gradient))
        self.square.lerp_(gradient.square(), (came * (1 - _VARIANCE)).expand_as(gradient))
        return came > 0

    def of(self, open_now: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        count = self.count.clamp(min=1)
        return self.mean / (1 - _MOMENTUM**count), (self.square / (1 - _VARIANCE**count)).sqrt() + _TINY


class CurvatureStatistics(Values):
    """Of gates with the estimator ``"curvature"``, which hand over minus what their bit is worth: the geometric mean
    of that, over steps in which the bit was there, times the share of them in which anything depended on it. A batch
    without some other bits may tell of a thousand times as much; it then counts as one of many.

    The gradient is that of the expected worth ``w``, ``-sum_k w_k prod_(j<=k) P(z_j > 0)``, in the logits as they are
    now, and a logit moves by how much the price is above or below it, in parts of it.
    """

    _NAMES = ("mean", "told", "share", "count")
    mean: Tensor
    told: Tensor
    share: Tensor
    count: Tensor

    def update(self, gradient: Tensor, came: Tensor) -> Tensor:
        seen = (gradient < 0) * came
        # A layer that is skipped, samples that are dropped: worth nothing in this step, which a mean of logarithms
        # would never forget.
        told = (gradient < -_NOTHING) * came
        self.count += seen
        self.told += told
        self.share.lerp_(told, seen * (1 - _MEMORY))
        self.mean.lerp_((-gradient).clamp(min=_NOTHING).log(), told * (1 - _MEMORY))
        return seen.any(0)

    def worth(self) -> Tensor:
        """``w``, in the unit of :func:`~cpq_lightning.functional.saliency.bit_saliency`."""
        mean = (self.mean / (1 - _MEMORY ** self.told.clamp(min=1))).exp()
        worth = mean * self.share / (1 - _MEMORY ** self.count.clamp(min=1))
        for k in range(1, len(worth)):
            # Of a bit that was never there: its residual is about half as large as that of the bit before it.
            worth[k] = torch.where(self.count[k] > 0, worth[k], worth[k - 1] / 4)
        return worth

    def of(self, open_now: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        slope = expected_slope(open_now, noise, self.worth())
        return -slope, slope + _TINY
