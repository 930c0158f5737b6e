"""Running means of the gates' gradients over training steps, for both gate estimators."""

from __future__ import annotations

import torch
from torch import Tensor

from cpq_lightning.functional.dropbits import expected_slope

# Decay rates of Adam's running means; shorter than usual for the square, since a nearly decided gate rarely has a
# gradient.
_MOMENTUM, _VARIANCE = 0.9, 0.99
# Decay rate of the running means of saliencies, which change slowly and are measured in each step.
_DECAY = 0.98
# A saliency up to this value counts as zero: the backward pass reports less where nothing depends on the bit.
_ZERO_SALIENCY, _EPSILON = 1e-28, 1e-36


class GateStatistics:
    """Running means of the gradients of gate logits, as matrices of shape (gates, rows).

    A row is one bit width: that of a quantizer, or of one of its channels.

    Args:
        shape: Numbers of gates and rows.
    """

    _NAMES: tuple[str, ...] = ()

    def __init__(self, shape: tuple[int, ...]) -> None:
        for name in self._NAMES:
            setattr(self, name, torch.zeros(shape, dtype=torch.float64))

    def update(self, gradient: Tensor, has_grad: Tensor) -> Tensor:
        """Add the gradients of one step; ``has_grad``, one value a row, is 0 where there was no gradient.

        Returns:
            Which rows had a usable gradient, bool.
        """
        raise NotImplementedError

    def of(self, open_now: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        """The gradient of the loss in each logit, and the unit ``s`` by which a logit's update is divided.

        Args:
            open_now: Probability that each gate is open.
            noise: Scale of the gates' noise, from 1 down to nearly 0.
        """
        raise NotImplementedError

    def saliency(self) -> Tensor | None:
        """The saliency of each bit; ``None`` if the estimator does not measure it."""
        return None

    def state_dict(self) -> dict[str, Tensor]:
        """The running means, for a checkpoint."""
        return {name: getattr(self, name).clone() for name in self._NAMES}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`."""
        for name in self._NAMES:
            setattr(self, name, state[name].clone())


class ConcreteStatistics(GateStatistics):
    """Statistics for the estimator ``"concrete"``: running means ``m`` of the gradient through the sampled gates and
    ``v`` of its square, as in Adam. A logit moves by ``m / sqrt(v)``.
    """

    _NAMES = ("mean", "square", "count")
    mean: Tensor
    square: Tensor
    count: Tensor

    def update(self, gradient: Tensor, has_grad: Tensor) -> Tensor:
        self.count += has_grad
        self.mean.lerp_(gradient, (has_grad * (1 - _MOMENTUM)).expand_as(gradient))
        self.square.lerp_(gradient.square(), (has_grad * (1 - _VARIANCE)).expand_as(gradient))
        return has_grad > 0

    def of(self, open_now: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        count = self.count.clamp(min=1)
        return self.mean / (1 - _MOMENTUM**count), (self.square / (1 - _VARIANCE**count)).sqrt() + _EPSILON


class CurvatureStatistics(GateStatistics):
    """Statistics for the estimator ``"curvature"``, whose gates receive minus the saliency of their bit as gradient.

    The saliency ``w`` of a bit is the geometric mean over the steps in which its gate was open, times the share of
    these steps in which the loss depended on the bit. The mean is geometric because a batch in which other bits are
    dropped may report a saliency a thousand times as large.

    The gradient is that of ``-sum_k w_k prod_(j<=k) P(z_j > 0)`` in the present logits. A logit moves by the relative
    difference between the price of its bit and this gradient.
    """

    _NAMES = ("mean", "told", "share", "count")
    mean: Tensor
    told: Tensor
    share: Tensor
    count: Tensor

    def update(self, gradient: Tensor, has_grad: Tensor) -> Tensor:
        was_open = (gradient < 0) * has_grad
        # A zero (a skipped layer, dropped samples) would dominate a mean of logarithms: it only lowers the share.
        salient = (gradient < -_ZERO_SALIENCY) * has_grad
        self.count += was_open
        self.told += salient
        self.share.lerp_(salient, was_open * (1 - _DECAY))
        self.mean.lerp_((-gradient).clamp(min=_ZERO_SALIENCY).log(), salient * (1 - _DECAY))
        return was_open.any(0)

    def saliency(self) -> Tensor:
        """The saliency ``w``, in the unit of :func:`~cpq_lightning.functional.saliency.bit_saliency`."""
        mean = (self.mean / (1 - _DECAY ** self.told.clamp(min=1))).exp()
        saliency = mean * self.share / (1 - _DECAY ** self.count.clamp(min=1))
        for k in range(1, len(saliency)):
            # A gate that was never open has no measurement. The residual of its bit is about half as large as that of
            # the previous bit, and the saliency goes with the square.
            saliency[k] = torch.where(self.count[k] > 0, saliency[k], saliency[k - 1] / 4)
        return saliency

    def of(self, open_now: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        slope = expected_slope(open_now, noise, self.saliency())
        return -slope, slope + _EPSILON
