"""An optimizer beside the user's, for one that cannot take the quantizers' parameters (LBFGS, Muon)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Adam, Optimizer


class Companion:
    """Adam on the quantizers' parameters, stepped whenever the user's optimizer steps.

    Its learning rate follows the user's schedule in proportion, and its gradients are cleared whenever the user's
    are, so that closures evaluated many times a step (LBFGS) and accumulated gradients come out right.

    Args:
        optimizer: The user's optimizer.
        parameters: The quantizers' parameters.
        lr: Learning rate while the user's is at its starting value.
        grad_scale: Reads the factor that gradients are scaled by (16-bit mixed precision), if any.
        wrappers: Objects that stand for the optimizer and have a ``zero_grad`` of their own.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Iterable[nn.Parameter],
        lr: float,
        grad_scale: Callable[[], float] = lambda: 1.0,
        wrappers: Iterable[Any] = (),
    ) -> None:
        self.optimizer = Adam(list(parameters), lr=lr)
        self._lr = lr
        group = optimizer.param_groups[0]
        self._user_lr = float(group.get("initial_lr", group["lr"])) or 1.0
        self._grad_scale = grad_scale
        self._watched = [(owner, owner.zero_grad) for owner in (optimizer, *wrappers)]
        for owner, zero_grad in self._watched:
            owner.zero_grad = partial(self._zero_both, zero_grad)
        self._handle = optimizer.register_step_post_hook(self._after)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What this optimizer trains."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _zero_both(self, zero_grad: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        zero_grad(*args, **kwargs)
        self.optimizer.zero_grad()

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        scale = self._grad_scale()
        grads = [p.grad for p in self.parameters if p.grad is not None]
        for grad in grads:
            grad.div_(scale)
        if grads and math.isfinite(float(torch.stack([g.abs().sum() for g in grads]).sum())):
            for group in self.optimizer.param_groups:
                group["lr"] = self._lr * float(optimizer.param_groups[0]["lr"]) / self._user_lr
            self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer, for a checkpoint."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.optimizer.load_state_dict(state)

    def remove(self) -> None:
        """Step no more."""
        self._handle.remove()
        for owner, zero_grad in self._watched:
            owner.zero_grad = zero_grad
