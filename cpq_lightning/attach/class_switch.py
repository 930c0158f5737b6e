"""Switch the class of a module, in place, to a subclass that mixes in quantization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, cast

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

S = TypeVar("S", bound="Switched")


class Switched(nn.Module):
    """Base of the mixins that :func:`switch_class` puts before a module's class."""

    mixin: ClassVar[type[Switched]]
    base_class: ClassVar[type[nn.Module]]

    # What the name of a class that is made begins with.
    name_prefix: ClassVar[str] = "Quantized"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # A module's class may register its subclasses, or want arguments for them: what is made here is none of them.
        pass

    @classmethod
    def made_for(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Additional attributes of the class that is made for ``base``."""
        return {}

    @classmethod
    def bases_for(cls, base: type[nn.Module]) -> tuple[type[nn.Module], ...]:
        """The bases of the class that is made for ``base``."""
        return (cls, base)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Pickle cannot import the class from a module, so it is rebuilt from its mixins, outermost first, and its base.
        mixins: list[type[Switched]] = []
        base: type[nn.Module] = type(self)
        while issubclass(base, Switched):
            mixins.append(base.mixin)
            base = base.base_class
        # A weight that a pruning mask or an older parametrization has computed has a graph and cannot be copied, so it
        # is detached; the next forward computes it again.
        getstate = getattr(self, "__getstate__", None)
        state = getstate() if getstate else self.__dict__
        if isinstance(state, dict):
            state = {k: v.detach() if isinstance(v, Tensor) and not v.is_leaf else v for k, v in state.items()}
        return _rebuild, (tuple(mixins), base), state


_classes: dict[tuple[type[Switched], type[nn.Module]], type[Switched]] = {}


def switched_class(mixin: type[S], base: type[nn.Module]) -> type[S]:
    """The subclass of both; always the same one, so that equal modules share compiled code."""
    if (mixin, base) not in _classes:
        namespace: dict[str, Any] = {
            "mixin": mixin,
            "base_class": base,
            "__module__": base.__module__,
            "__doc__": base.__doc__,
        }
        namespace |= mixin.made_for(base)
        made = type(f"{mixin.name_prefix}{base.__name__}", mixin.bases_for(base), namespace)
        _classes[mixin, base] = cast("type[Switched]", made)
    return cast("type[S]", _classes[mixin, base])


def switch_class(module: nn.Module, mixin: type[S]) -> S:
    """Mix a class into a module's class, in place."""
    _change_class(module, lambda cls: switched_class(mixin, cls))
    return cast(S, module)


def switch_class_back(module: Switched) -> None:
    """Undo :func:`switch_class`, in place."""
    _change_class(cast(nn.Module, module), lambda cls: cast(type[Switched], cls).base_class)


def original_class(module: nn.Module) -> None:
    """Give a module with a parametrization a class that no copy of the module shares."""
    _change_class(module, lambda cls: cls)


def _change_class(module: nn.Module, change: Callable[[type[nn.Module]], type[nn.Module]]) -> None:
    cls = type(module)
    if not is_parametrized(module) or cls.__name__ != f"Parametrized{cls.__bases__[0].__name__}":
        changed = change(cls)
        try:
            module.__class__ = changed
        except TypeError as error:
            raise TypeError(
                f"{cls.__name__} cannot be quantized: Python does not let its instances change their class ({error}), "
                "as where a class names one that is no nn.Module first: class Net(ABC, nn.Linear). Name the nn.Module "
                f"first, or give ignore=[{cls.__name__!r}]."
            ) from error
        return
    # torch's Parametrized class has a property for each parametrized tensor, and torch restores its first base when the
    # parametrization is removed, so that class must stay the outermost one.
    base = change(cls.__bases__[0])
    properties = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(f"Parametrized{base.__name__}", (base,), properties)


def _rebuild(mixins: tuple[type[Switched], ...], base: type[nn.Module]) -> nn.Module:
    cls = base
    for mixin in reversed(mixins):
        cls = switched_class(mixin, cls)
    return cls.__new__(cls)
