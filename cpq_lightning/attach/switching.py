"""Surgery on one module: its class is switched, in place, to a subclass of its own class made for it."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar, cast

from torch import nn

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
        getstate = getattr(self, "__getstate__", None)
        return _rebuild, (tuple(mixins), base), getstate() if getstate else self.__dict__


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
    module.__class__ = switched_class(mixin, type(module))
    return cast(S, module)


def switch_class_back(module: Switched) -> None:
    """Give a module its own class back, in place."""
    cast(nn.Module, module).__class__ = module.base_class


def _rebuild(mixins: tuple[type[Switched], ...], base: type[nn.Module]) -> nn.Module:
    cls = base
    for mixin in reversed(mixins):
        cls = switched_class(mixin, cls)
    return cls.__new__(cls)
