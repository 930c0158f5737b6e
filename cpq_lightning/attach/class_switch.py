"""Surgery on one module: its class is switched, in place, to a subclass of its own class made for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, cast

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

S = TypeVar("S", bound="Switched")


class Switched(nn.Module):
    """Mixed in before a module's own class by :func:`switch_class`."""

    mixin: ClassVar[type[Switched]]
    base_class: ClassVar[type[nn.Module]]

    @classmethod
    def made_for(cls, base: type[nn.Module]) -> dict[str, Any]:
        """What the class made for a module's own one has beside the mixin."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class exists in no module: rebuild it from those that it was made of, the first of them last.
        mixins: list[type[Switched]] = []
        base: type[nn.Module] = type(self)
        while issubclass(base, Switched):
            mixins.append(base.mixin)
            base = base.base_class
        # What a pruning mask, or an older parametrization, has computed before a forward has a graph, which no copy can
        # have: it is computed anew before the next one.
        getstate = getattr(self, "__getstate__", None)
        state = getstate() if getstate else self.__dict__
        if isinstance(state, dict):
            state = {k: v.detach() if isinstance(v, Tensor) and not v.is_leaf else v for k, v in state.items()}
        return _rebuild, (tuple(mixins), base), state


_classes: dict[tuple[type[Switched], type[nn.Module]], type[Switched]] = {}


def switched_class(mixin: type[S], base: type[nn.Module]) -> type[S]:
    """The subclass of both; the same one each time, so that equal modules share compiled code."""
    if (mixin, base) not in _classes:
        namespace: dict[str, Any] = {
            "mixin": mixin,
            "base_class": base,
            "__module__": base.__module__,
            "__doc__": base.__doc__,
        }
        namespace |= mixin.made_for(base)
        _classes[mixin, base] = type(f"Quantized{base.__name__}", (mixin, base), namespace)
    return cast("type[S]", _classes[mixin, base])


def switch_class(module: nn.Module, mixin: type[S]) -> S:
    """Give a module the mixin's behaviour, in place."""
    _change_class(module, lambda own: switched_class(mixin, own))
    return cast(S, module)


def switch_class_back(module: Switched) -> None:
    """Give a module the class back that it had before :func:`switch_class`, in place."""
    _change_class(cast(nn.Module, module), lambda own: cast(type[Switched], own).base_class)


def original_class(module: nn.Module) -> None:
    """Give a module with a parametrization a class that it shares with no copy of it."""
    _change_class(module, lambda own: own)


def _change_class(module: nn.Module, change: Callable[[type[nn.Module]], type[nn.Module]]) -> None:
    own = type(module)
    if not is_parametrized(module) or own.__name__ != f"Parametrized{own.__bases__[0].__name__}":
        module.__class__ = change(own)
        return
    # torch has put a class of its own in front, with a property for each parametrized tensor, and takes its first base
    # for the one to give back: it stays in front.
    below = change(own.__bases__[0])
    properties = {name: value for name, value in vars(own).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(f"Parametrized{below.__name__}", (below,), properties)


def _rebuild(mixins: tuple[type[Switched], ...], base: type[nn.Module]) -> nn.Module:
    cls = base
    for mixin in reversed(mixins):
        cls = switched_class(mixin, cls)
    return cls.__new__(cls)
