"""What happens beside an optimizer of the user's: whenever it clears gradients, and whenever it steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Beside:
    """Keeps parameters out of an optimizer but in its rhythm.

    Their gradients are cleared whenever the optimizer's are, so that closures evaluated many times a step (LBFGS) and
    accumulated gradients come out right, and handed over, unscaled, whenever it steps: not where 16-bit precision skips
    a step, nor where a gradient is not finite. A group that is added to the optimizer later, by a callback that
    unfreezes layers, comes without them.

    Args:
        optimizer: The user's optimizer.
        parameters: The parameters beside it.
        stepped: Called with their gradients (``None`` where there is none) after each step.
        grad_scale: Reads the factor that gradients are scaled by (16-bit mixed precision), if any.
        wrappers: Objects that stand for the optimizer and have a ``zero_grad`` of their own.
        average: Averages a tensor over all processes in place, where nobody else does it for these parameters.
        kept_out: Parameters that may not be added to the optimizer; ``None`` means those beside it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Iterable[nn.Parameter],
        stepped: Callable[[list[Tensor | None]], None],
        grad_scale: Callable[[], float] = lambda: 1.0,
        wrappers: Iterable[Any] = (),
        average: Callable[[Tensor], None] | None = None,
        kept_out: Iterable[nn.Parameter] | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self._stepped = stepped
        self._grad_scale = grad_scale
        self._average = average
        self._kept_out = {id(p) for p in (self.parameters if kept_out is None else kept_out)}
        self._removed = False
        self._watched: list[tuple[Any, str, Callable[..., None], Callable[..., None]]] = []
        for owner in (optimizer, *wrappers):
            self._watch(owner, "zero_grad", self._zero)
        self._watch(optimizer, "add_param_group", self._add)
        self._handle = stepping(optimizer).register_step_post_hook(self._after)

    def _watch(self, owner: Any, name: str, instead: Callable[..., None]) -> None:
        method = getattr(owner, name)
        replaced = partial(instead, method)
        setattr(owner, name, replaced)
        self._watched.append((owner, name, method, replaced))

    def _zero(self, zero_grad: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        zero_grad(*args, **kwargs)
        for parameter in () if self._removed else self.parameters:
            parameter.grad = None

    def _add(self, add: Callable[..., None], param_group: dict[str, Any]) -> None:
        own = set() if self._removed else self._kept_out
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        left = [p for p in params if id(p[1] if isinstance(p, tuple) else p) not in own]
        if left or not params:
            add({**param_group, "params": left})

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        scale = self._grad_scale()
        if self._average is not None:
            average_gradients(self.parameters, self._average)
        grads = [p.grad for p in self.parameters]
        present = [g.div_(scale) for g in grads if g is not None]
        if present and math.isfinite(float(torch.stack([g.abs().sum() for g in present]).sum())):
            self._stepped(grads)

    def rest(self) -> None:
        """Hand over no more gradients; the parameters stay out of the optimizer."""
        self._handle.remove()

    def remove(self) -> None:
        """Leave the optimizer alone."""
        self._handle.remove()
        # Somebody may have wrapped the method again since: then what is inside passes everything on.
        self._removed = True
        for owner, name, method, replaced in self._watched:
            if getattr(owner, name) is replaced:
                setattr(owner, name, method)


def average_gradients(parameters: Sequence[nn.Parameter], average: Callable[[Tensor], None]) -> None:
    """Average gradients over all processes, in one go; one that is missing counts as zero."""
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters])
    average(flat)
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = grad.view_as(p).clone()


def stepping(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose step hooks fire: itself, or the one inside a wrapper that skips torch's constructor (timm's
    Lookahead).
    """
    if getattr(type(optimizer).step, "hooked", False):
        return optimizer
    inner = next((value for value in vars(optimizer).values() if isinstance(value, Optimizer)), None)
    return optimizer if inner is None else stepping(inner)
