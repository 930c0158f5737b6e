"""Lightning under both of its names, ``lightning`` and ``pytorch_lightning``: the same code, each with its own classes.

A Trainer asks whether callbacks are instances of its own package's ``Callback``, and whoever uses one catches that
package's exceptions. So the classes here have those of ``lightning`` for bases, and those of ``pytorch_lightning`` too
from when somebody else imports it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

import lightning.pytorch
from lightning.fabric.utilities import exceptions

_OTHER = "pytorch_lightning"
PACKAGES = ("lightning", _OTHER, "lightning_fabric")

if TYPE_CHECKING:
    import lightning_fabric.utilities.exceptions
    import pytorch_lightning

    class _Callback(lightning.pytorch.Callback, pytorch_lightning.Callback): ...

    class _MisconfigurationException(
        exceptions.MisconfigurationException, lightning_fabric.utilities.exceptions.MisconfigurationException
    ): ...
else:
    _Callback, _MisconfigurationException = lightning.pytorch.Callback, exceptions.MisconfigurationException


class Callback(_Callback):
    """The base of this package's callbacks: one for Trainers of either name.

    Pickled or copied it is its settings, which it has by the names of its arguments, and what a subclass of somebody's
    has added: what it holds of a run, optimizers and hooks among it, belongs to that run.
    """

    def __getstate__(self) -> dict[str, Any]:
        of_runs = {name for name in vars(self._anew(vars(self))) if name.startswith("_")}
        return {
            n: v for n, v in vars(self).items() if n not in of_runs and not (n[0] == "_" and hasattr(type(self), n))
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({**vars(self._anew(state)), **state})

    def _anew(self, settings: Mapping[str, Any]) -> Callback:
        own = next(cls for cls in type(self).__mro__ if cls.__module__.startswith("cpq_lightning."))
        names = inspect.signature(own).parameters
        return own(**{name: settings[name] for name in names if name in settings})


class MisconfigurationException(_MisconfigurationException):
    """Lightning's exception of that name, of either package."""


def is_a(thing: object, *names: str) -> bool:
    """Whether something is of one of these classes; by name, which is the same in both packages."""
    return any(cls.__name__ in names for cls in type(thing).__mro__)


def _take_bases(package: ModuleType) -> None:
    """Make the classes here subclasses of the other package's, those of callbacks that exist already among them."""
    theirs = import_module(f"{package.__name__}.utilities.exceptions").MisconfigurationException
    for own, base in ((Callback, package.Callback), (MisconfigurationException, theirs)):
        # Whoever makes one name an alias of the other has one class.
        if not issubclass(own, base):
            own.__bases__ = (*own.__bases__, base)


class _OtherFinder(MetaPathFinder):
    """Notices the import of the other package, which it leaves to the finders behind it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _OTHER:
            return None
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
        specs = (finder.find_spec(fullname, path, target) for finder in behind if hasattr(finder, "find_spec"))
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _OtherLoader(spec.loader)
        return spec


class _OtherLoader(Loader):
    """Loads as another loader does, and takes the bases once that is done."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module is the other loader's, as it is with importlib.util.LazyLoader.
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _take_bases(module)


sys.meta_path.insert(0, _OtherFinder())
if sys.modules.get(_OTHER) is not None:
    # Not just looked up: another thread may still be importing it.
    _take_bases(import_module(_OTHER))
