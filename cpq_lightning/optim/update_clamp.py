"""Update clamp: limits the change of the quantizers' parameters in one update, for any optimizer and learning rate."""

# pyright: reportPrivateImportUsage=false
# The operations on lists of tensors, torch._foreach_*, have private names only.

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cpq_lightning.optim.optimizer_hook import before_update, stepping

# About 10 % of the scale, and less of the noise. The recipes change neither by more than 0.003 in an update; Adam at
# the absurd rate of 0.1 by at most 0.08.
BOUND = 0.1
# State entries that carry momentum, as named in optimizers of torch, timm and others.
_MOMENTUM_NAMES = ("momentum_buffer", "exp_avg")


class UpdateClamp:
    """Clamps the update of some parameters of an optimizer; updates within :data:`BOUND` stay bitwise unchanged.

    A larger update is cut off at the bound, and its momentum is divided by the same ratio. Otherwise a single gradient
    that is a thousand times too large would keep the updates at the bound for dozens of steps. The operations are
    batched over all parameters, and nothing is copied from the device.

    A wrapper that averages values over several updates (timm's Lookahead) may move parameters back by more than the
    bound, to values between earlier ones.

    Args:
        optimizer: The optimizer of the parameters.
        parameters: One-dimensional parameters on one device. They are logarithms or logits, so that the bound is a
            relative one.
    """

    def __init__(self, optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
        self.parameters = list(parameters)
        self._start: Tensor | None = None
        # With a closure also after its first call, whose forward may fit ranges again. Later calls are probes within
        # the update.
        before_update(optimizer, self._save_values)
        stepping(optimizer).register_step_post_hook(self._after)

    @torch.no_grad()
    def _save_values(self) -> None:
        self._start = torch.cat(self.parameters)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        assert self._start is not None
        now = torch.cat(self.parameters)
        clamped = now.clamp(self._start - BOUND, self._start + BOUND)
        # Ratio of the update to the bound: exactly 1 where nothing is cut off.
        ratio = 1 + (now - clamped).abs() / BOUND
        sizes = [len(p) for p in self.parameters]
        torch._foreach_copy_(self.parameters, clamped.split(sizes))
        states = [optimizer.state.get(p, {}) for p in self.parameters]
        for name in _MOMENTUM_NAMES:
            pairs = zip(states, ratio.split(sizes), strict=True)
            momenta = [(state[name], part) for state, part in pairs if isinstance(state.get(name), Tensor)]
            if momenta:
                torch._foreach_div_([momentum for momentum, _ in momenta], [part for _, part in momenta])
