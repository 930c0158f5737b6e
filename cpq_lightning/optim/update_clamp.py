"""A bound on what one update may do to the quantizers, whatever the optimizer and its learning rate."""

# pyright: reportPrivateImportUsage=false
# torch has the operations on many tensors at once under private names only.

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cpq_lightning.optim.optimizer_hook import stepping

# Some 10 % of a step, and less of the noise. The recipes move neither by more than 0.003 in an update; Adam at the
# absurd rate of 0.1 by no more than 0.08.
BOUND = 0.1
# What carries one update into the next, by the names that it has in optimizers of torch, timm and others.
_MOMENTA = ("momentum_buffer", "exp_avg")


class UpdateClamp:
    """Keeps each update of an optimizer within a bound for some of its parameters; within it not a bit is changed.

    An update that goes further ends at the bound, and its momentum shrinks in proportion: after one gradient that is a
    thousand times too large the parameter would else go to the bound in dozens of updates more. All parameters share a
    few calls, and nothing is read back from the device.

    A wrapper that averages values over several updates (timm's Lookahead) may go back by more, to values within those
    that there were.

    Args:
        optimizer: The optimizer that moves the parameters.
        parameters: One-dimensional, on one device, and logarithms or logits: a bound on them is a relative one.
        bound: How far each element may move in an update.
    """

    def __init__(self, optimizer: Optimizer, parameters: Iterable[Tensor], bound: float = BOUND) -> None:
        self.parameters = list(parameters)
        self.bound = bound
        self._start: Tensor | None = None
        inner = stepping(optimizer)
        self._handles = [inner.register_step_pre_hook(self._before), inner.register_step_post_hook(self._after)]

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        self._remember()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            return None
        closure = self._remembering(closure)
        return ((args[0], closure, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": closure})

    def _remembering(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        called = False

        def remembering(*args: Any, **kwargs: Any) -> Any:
            nonlocal called
            result = closure(*args, **kwargs)
            # A first forward may have fitted ranges anew. Later calls are an optimizer's probes on the way.
            if not called:
                called = True
                self._remember()
            return result

        return remembering

    @torch.no_grad()
    def _remember(self) -> None:
        self._start = torch.cat(self.parameters)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        assert self._start is not None
        now = torch.cat(self.parameters)
        held = now.clamp(self._start - self.bound, self._start + self.bound)
        # How many times the bound an update was: exactly 1 where nothing is cut off.
        times = 1 + (now - held).abs() / self.bound
        sizes = [len(p) for p in self.parameters]
        torch._foreach_copy_(self.parameters, held.split(sizes))
        states = [optimizer.state.get(p, {}) for p in self.parameters]
        for name in _MOMENTA:
            pairs = zip(states, times.split(sizes), strict=True)
            found = [(state[name], own) for state, own in pairs if isinstance(state.get(name), Tensor)]
            if found:
                torch._foreach_div_([momentum for momentum, _ in found], [own for _, own in found])

    def remove(self) -> None:
        """Leave the optimizer alone."""
        for handle in self._handles:
            handle.remove()
