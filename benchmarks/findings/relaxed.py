"""Relaxed quantization with the Gumbel-softmax: the paper's own baseline.

Louizos et al., *Relaxed Quantization for Discretized Neural Networks*, ICLR 2019 (arXiv 1810.01875).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.quantized_layer import StepAtFirst

# Noise at the start, in steps: RQ's.
_NOISE = 1 / 3
# Points at either side of the nearest one that are sampled from, as RQ's local grid has it: beyond them lie 1 to 5 % of
# the mass at the noise that training starts with, and each more would cost a third of a run.
_BESIDE = 1


def _sample(u: Tensor, s: Tensor, uniform: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Levels, shape (n,): mixtures of the points near ``u``, by a Gumbel-softmax of their probabilities.

    A softmax of ``log p + gumbel`` at temperature 1 is ``p / e`` over its sum, ``e`` of an exponential distribution.

    Args:
        u: Values in steps, shape (n,).
        s: The logistic noise in steps.
        uniform: Noise in (0, 1), shape (points, n).
        low: Lowest level, a scalar: as a number it would be compiled anew for each grid.
        high: Highest level, likewise.
    """
    # From a step beyond the grid on its last point has all the mass, but for what underflows.
    u = u.clamp(low - 1, high + 1)
    nearest = u.detach().round()
    total = weighted = torch.zeros_like(u)
    for i in range(2 * _BESIDE + 1):
        point = nearest + (i - _BESIDE)
        # S((n + 1/2 - u) / s) - S((n - 1/2 - u) / s), but for a factor that all points share.
        p = torch.sigmoid((point + 0.5 - u) / s) * torch.sigmoid((u - point + 0.5) / s)
        share = torch.where((point >= low) & (point <= high), p / -uniform[i].log(), 0.0)
        total, weighted = total + share, weighted + share * point
    return weighted / total


_compiled = torch.compile(_sample, dynamic=True)


class Relaxed(StepAtFirst):
    """RQ's quantizer: sampled in training, the nearest point in evaluation."""

    def __init__(self, bits: int, signed: bool) -> None:
        super().__init__(bits, signed)
        self.log_sigma = nn.Parameter(torch.zeros(1))

    def quantize(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.nearest(x)
        step = self.step
        u = x / step
        flat = u.flatten()
        uniform = torch.rand(2 * _BESIDE + 1, len(flat), device=x.device).clamp_(1e-7, 1 - 1e-7)
        levels = _compiled(
            flat, _NOISE * self.log_sigma.exp(), uniform, u.new_tensor(self.low), u.new_tensor(self.high)
        )
        return step * levels.view_as(u)
