"""What happens beside an optimizer of the user's: whenever it clears gradients, and whenever it steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Beside:
    """Keeps parameters out of an optimizer but in its rhythm.

    Their gradients are cleared whenever the optimizer's are, so that closures evaluated many times a step (LBFGS) and
    accumulated gradients come out right, and handed over, unscaled, whenever it steps: not where 16-bit precision skips
    a step, nor where a gradient is not finite.

    Args:
        optimizer: The user's optimizer.
        parameters: The parameters beside it.
        stepped: Called with their gradients (``None`` where there is none) after each step.
        grad_scale: Reads the factor that gradients are scaled by (16-bit mixed precision), if any.
        wrappers: Objects that stand for the optimizer and have a ``zero_grad`` of their own.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Iterable[nn.Parameter],
        stepped: Callable[[list[Tensor | None]], None],
        grad_scale: Callable[[], float] = lambda: 1.0,
        wrappers: Iterable[Any] = (),
    ) -> None:
        self.parameters = list(parameters)
        self._stepped = stepped
        self._grad_scale = grad_scale
        self._watched = [(owner, owner.zero_grad) for owner in (optimizer, *wrappers)]
        for owner, zero_grad in self._watched:
            owner.zero_grad = partial(self._zero, zero_grad)
        self._handle = optimizer.register_step_post_hook(self._after)

    def _zero(self, zero_grad: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        zero_grad(*args, **kwargs)
        for parameter in self.parameters:
            parameter.grad = None

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        scale = self._grad_scale()
        grads = [p.grad for p in self.parameters]
        present = [g.div_(scale) for g in grads if g is not None]
        if present and math.isfinite(float(torch.stack([g.abs().sum() for g in present]).sum())):
            self._stepped(grads)

    def remove(self) -> None:
        """Leave the optimizer alone."""
        self._handle.remove()
        for owner, zero_grad in self._watched:
            owner.zero_grad = zero_grad
