"""Hooks on the user's optimizer, called when it clears gradients and when it steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class OptimizerHook:
    """Keeps parameters out of an optimizer, but clears their gradients and updates them when the optimizer does so.

    Their gradients are cleared whenever the optimizer's are, which keeps closures evaluated many times a step (LBFGS)
    and accumulated gradients correct. ``stepped`` receives them, unscaled, whenever the optimizer steps, unless a
    gradient scaler skips the step or one of them is not finite. Without a scaler nothing is copied from the device, and
    ``stepped`` receives the gradients unchanged. While the optimizer is toggled off, so that none of its parameters
    requires a gradient, these parameters get zero gradients. They are removed from any group that is added to the
    optimizer later, as by a callback that unfreezes layers.

    Args:
        optimizer: The user's optimizer.
        parameters: The parameters to keep out, one-dimensional and on one device.
        stepped: Called with their gradients (``None`` for a missing one) after each step.
        grad_scale: Returns the factor by which gradients are scaled; ``None`` without a gradient scaler.
        wrappers: Objects that stand in for the optimizer and define its methods themselves.
        average: Averages a tensor over all processes in place; ``None`` if the gradients of these parameters are
            averaged already.
        kept_out: Parameters that may not be added to the optimizer; ``None`` means ``parameters``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Iterable[nn.Parameter],
        stepped: Callable[[list[Tensor | None]], None],
        grad_scale: Callable[[], float] | None = None,
        wrappers: Iterable[Any] = (),
        average: Callable[[Tensor], None] | None = None,
        kept_out: Iterable[nn.Parameter] | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self._optimizer = optimizer
        self._stepped = stepped
        self._grad_scale = grad_scale
        self._average = average
        self._kept_out = {id(p) for p in (self.parameters if kept_out is None else kept_out)}
        self._removed = False
        self._wrapped: list[tuple[Any, str, Callable[..., Any], Callable[..., Any]]] = []
        # A wrapper inherits methods of the optimizer's class, which bypass attributes set on the inner optimizer.
        self._owners = list({id(o): o for o in (*wrappers, *nested(optimizer))}.values())
        self._wrap_method("zero_grad", self._zero_grad)
        self._wrap_method("add_param_group", self._add_param_group)
        self._was_on = self._is_on()
        self._handles = [stepping(optimizer).register_step_post_hook(self._after)]
        self._handles += [_register_hook(p, self._on_gradient) for p in self.parameters]

    def _wrap_method(self, name: str, replacement: Callable[..., Any]) -> None:
        for owner in self._owners:
            method = getattr(owner, name, None)
            if method is not None:
                replaced = partial(replacement, method)
                setattr(owner, name, replaced)
                self._wrapped.append((owner, name, method, replaced))

    def follow(self, name: str, call: Callable[[], Any]) -> None:
        """Call ``call`` after each call of the optimizer's method ``name``."""

        def followed(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            if not self._removed:
                call()
            return result

        self._wrap_method(name, followed)

    def _zero_grad(self, zero_grad: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        zero_grad(*args, **kwargs)
        for parameter in () if self._removed else self.parameters:
            parameter.grad = None

    def _add_param_group(self, add: Callable[..., None], param_group: dict[str, Any]) -> None:
        excluded = set() if self._removed else self._kept_out
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        remaining = [p for p in params if id(p[1] if isinstance(p, tuple) else p) not in excluded]
        if remaining or not params:
            add({**param_group, "params": remaining})

    def _is_on(self) -> bool:
        return any(p.requires_grad for group in self._optimizer.param_groups for p in group["params"])

    def _on_gradient(self, grad: Tensor) -> Tensor | None:
        # Only after it was on once: in a fully frozen network the quantizers still train.
        if self._is_on():
            self._was_on = True
        elif self._was_on:
            return torch.zeros_like(grad)
        return None

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # All processes run backward together, so that none waits alone in the average.
        if all(p.grad is None for p in self.parameters):
            return
        if self._average is not None:
            average_gradients(self.parameters, self._average)
        gradients = [p.grad for p in self.parameters]
        if self._grad_scale is None or self._unscale(optimizer, gradients, self._grad_scale()):
            self._stepped(gradients)

    def _unscale(self, optimizer: Optimizer, gradients: Iterable[Tensor | None], scale: float) -> bool:
        """Divide the gradients by ``scale``; return whether they are finite and the step was not skipped."""
        present = [gradient.div_(scale) for gradient in gradients if gradient is not None]
        if has_skipped(optimizer):
            return False
        return math.isfinite(float(torch.stack([gradient.abs().sum() for gradient in present]).sum()))

    def rest(self) -> None:
        """Stop calling ``stepped``; the parameters stay out of the optimizer."""
        for handle in self._handles:
            handle.remove()

    def remove(self) -> None:
        """Remove all hooks from the optimizer and the parameters."""
        self.rest()
        # Third-party code may have wrapped the method again; then the inner wrapper only forwards calls.
        self._removed = True
        for owner, name, method, replaced in reversed(self._wrapped):
            if vars(owner).get(name) is replaced:
                _restore(owner, name, method)


def _restore(owner: Any, name: str, method: Callable[..., Any]) -> None:
    """Restore a method of ``owner``: one of its class by removing the instance attribute."""
    if getattr(method, "__func__", None) is getattr(type(owner), name, method):
        delattr(owner, name)
    else:
        setattr(owner, name, method)


def _register_hook(parameter: nn.Parameter, hook: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Register a hook on a parameter, even if it is frozen."""
    trains = parameter.requires_grad
    handle = parameter.requires_grad_(True).register_hook(hook)
    parameter.requires_grad_(trains)
    return handle


def average_gradients(parameters: Sequence[nn.Parameter], average: Callable[[Tensor], None]) -> None:
    """Average gradients over all processes in one call; a missing gradient counts as zero."""
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters])
    average(flat)
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = grad.view_as(p).clone()


def has_skipped(optimizer: Optimizer) -> bool:
    """Whether the optimizer's last step left its update out: if 16-bit gradients overflow, a fused optimizer does so
    inside its step, and still runs its hooks.
    """
    overflow = getattr(optimizer, "found_inf", None)
    return overflow is not None and bool(overflow)


def nested(optimizer: Optimizer) -> Iterator[Optimizer]:
    """An optimizer and those that it wraps, from the outermost to the innermost."""
    visited: list[Optimizer] = []
    while optimizer not in visited:
        visited.append(optimizer)
        yield optimizer
        inner = next((value for value in vars(optimizer).values() if isinstance(value, Optimizer)), None)
        if inner is None:
            return
        optimizer = inner


def stepping(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose step hooks run with every update: the innermost one with the same parameters.

    A wrapper may skip torch's constructor, and with it the hooks (timm's Lookahead), or may be called by methods other
    than ``step`` (the two steps of SAM).
    """
    result = optimizer
    for inner in nested(optimizer):
        has_hooks = getattr(type(result).step, "hooked", False)
        if not has_hooks or _parameters(inner) == _parameters(optimizer):
            result = inner
    return result


def _parameters(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def before_update(optimizer: Optimizer, call: Callable[[], None]) -> RemovableHandle:
    """Call ``call`` before each update of an optimizer: at the start of its step, and again after the first call of the
    closure, which may have changed the optimizer's settings or its parameters.
    """

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        call()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            return None
        closure = _with_call_after_first(closure, call)
        return ((args[0], closure, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": closure})

    return stepping(optimizer).register_step_pre_hook(before)


def _with_call_after_first(closure: Callable[..., Any], call: Callable[[], None]) -> Callable[..., Any]:
    called = False

    def calling(*args: Any, **kwargs: Any) -> Any:
        nonlocal called
        result = closure(*args, **kwargs)
        if not called:
            called = True
            call()
        return result

    return calling
