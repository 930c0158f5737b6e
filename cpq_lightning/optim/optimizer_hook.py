"""What happens beside an optimizer of the user's: whenever it clears gradients, and whenever it steps."""

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
    """Keeps parameters out of an optimizer but in its rhythm.

    Their gradients are cleared whenever the optimizer's are, so that closures evaluated many times a step (LBFGS) and
    accumulated gradients come out right. They are handed over, unscaled, whenever it steps: not where a gradient scaler
    skips the step, nor where one of these is not finite. Without a scaler nothing is read back from the device, and
    gradients are handed over as they are. While the optimizer is toggled off, so that none of its own parameters
    requires a gradient, these receive zeros. A group that is added to the optimizer later, by a callback that unfreezes
    layers, comes without them.

    Args:
        optimizer: The user's optimizer.
        parameters: The parameters beside it, one-dimensional and on one device.
        stepped: Called with their gradients (``None`` where there is none) after each step.
        grad_scale: Reads the factor that gradients are scaled by; ``None`` where no gradient scaler is in use.
        wrappers: Objects that stand for the optimizer and have methods of their own.
        average: Averages a tensor over all processes in place, where nobody else does it for these parameters.
        kept_out: Parameters that may not be added to the optimizer; ``None`` means those beside it.
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
        self._watched: list[tuple[Any, str, Callable[..., Any], Callable[..., Any]]] = []
        # Wrappers inherit methods of the optimizer's class, which pass by what is set on the optimizer.
        self._owners = list({id(o): o for o in (*wrappers, *nested(optimizer))}.values())
        self._watch("zero_grad", self._zero)
        self._watch("add_param_group", self._add)
        self._was_on = self._is_on()
        self._handles = [stepping(optimizer).register_step_post_hook(self._after)]
        self._handles += [_hooked(p, self._received) for p in self.parameters]

    def _watch(self, name: str, instead: Callable[..., Any]) -> None:
        for owner in self._owners:
            method = getattr(owner, name, None)
            if method is not None:
                replaced = partial(instead, method)
                setattr(owner, name, replaced)
                self._watched.append((owner, name, method, replaced))

    def follow(self, name: str, call: Callable[[], Any]) -> None:
        """Call something behind each call of a method of the optimizer."""

        def followed(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            if not self._removed:
                call()
            return result

        self._watch(name, followed)

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

    def _is_on(self) -> bool:
        return any(p.requires_grad for group in self._optimizer.param_groups for p in group["params"])

    def _received(self, grad: Tensor) -> Tensor | None:
        # Not before it was on: of a network that is frozen as a whole the quantizers train all the same.
        if self._is_on():
            self._was_on = True
        elif self._was_on:
            return torch.zeros_like(grad)
        return None

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # Processes that share a model go backward together: none waits for another in an average.
        if all(p.grad is None for p in self.parameters):
            return
        if self._average is not None:
            average_gradients(self.parameters, self._average)
        gradients = [p.grad for p in self.parameters]
        if self._grad_scale is None or self._unscale(optimizer, gradients, self._grad_scale()):
            self._stepped(gradients)

    def _unscale(self, optimizer: Optimizer, gradients: Iterable[Tensor | None], scale: float) -> bool:
        """Divide by the scale; whether this is a step that counts."""
        present = [gradient.div_(scale) for gradient in gradients if gradient is not None]
        # Fused optimizers skip a step within it where 16-bit gradients overflow, and their hooks run all the same.
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and bool(overflow):
            return False
        return math.isfinite(float(torch.stack([gradient.abs().sum() for gradient in present]).sum()))

    def rest(self) -> None:
        """Hand over no more gradients; the parameters stay out of the optimizer."""
        for handle in self._handles:
            handle.remove()

    def remove(self) -> None:
        """Leave the optimizer and the parameters alone."""
        self.rest()
        # Somebody may have wrapped the method again since: then what is inside passes everything on.
        self._removed = True
        for owner, name, method, replaced in reversed(self._watched):
            if vars(owner).get(name) is replaced:
                _restore(owner, name, method)


def _restore(owner: Any, name: str, method: Callable[..., Any]) -> None:
    """Give an object its method back: from its class, where it came from there."""
    if getattr(method, "__func__", None) is getattr(type(owner), name, method):
        delattr(owner, name)
    else:
        setattr(owner, name, method)


def _hooked(parameter: nn.Parameter, hook: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Register a hook on a parameter, also on one that is frozen yet."""
    trains = parameter.requires_grad
    handle = parameter.requires_grad_(True).register_hook(hook)
    parameter.requires_grad_(trains)
    return handle


def average_gradients(parameters: Sequence[nn.Parameter], average: Callable[[Tensor], None]) -> None:
    """Average gradients over all processes, in one go; one that is missing counts as zero."""
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters])
    average(flat)
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = grad.view_as(p).clone()


def nested(optimizer: Optimizer) -> Iterator[Optimizer]:
    """An optimizer, and those that it wraps, from outside to inside."""
    found: list[Optimizer] = []
    while optimizer not in found:
        found.append(optimizer)
        yield optimizer
        inner = next((value for value in vars(optimizer).values() if isinstance(value, Optimizer)), None)
        if inner is None:
            return
        optimizer = inner


def stepping(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose step hooks fire with every update: the innermost of those that hold the same parameters.

    A wrapper may skip torch's constructor, and with it the hooks (timm's Lookahead). Or it may be used by other methods
    than ``step`` (the two steps of SAM).
    """
    found = optimizer
    for inner in nested(optimizer):
        if not _has_hooks(found) or _parameters(inner) == _parameters(optimizer):
            found = inner
    return found


def _has_hooks(optimizer: Optimizer) -> bool:
    return bool(getattr(type(optimizer).step, "hooked", False))


def _parameters(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def before_update(optimizer: Optimizer, call: Callable[[], None]) -> RemovableHandle:
    """Call something before each update of an optimizer: as its step begins, and again behind the first call of its
    closure, which may have changed what the update goes by.
    """

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        call()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            return None
        closure = _calling_once(closure, call)
        return ((args[0], closure, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": closure})

    return stepping(optimizer).register_step_pre_hook(before)


def _calling_once(closure: Callable[..., Any], call: Callable[[], None]) -> Callable[..., Any]:
    called = False

    def calling(*args: Any, **kwargs: Any) -> Any:
        nonlocal called
        result = closure(*args, **kwargs)
        if not called:
            called = True
            call()
        return result

    return calling
