"""Base classes for both Lightning packages, ``lightning`` and ``pytorch_lightning``: the same code, separate classes.

A Trainer checks that callbacks are instances of the ``Callback`` of its package, and users catch the exceptions of the
package that they import. So the classes here inherit from those of ``lightning``, and also from those of
``pytorch_lightning`` as soon as other code imports it.
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

from cpq_lightning.errors import CPQError, ResumeError

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
    """Base class of this package's callbacks, for Trainers of both Lightning packages.

    A pickle or a copy has the callback's settings, which are attributes with the names of its arguments, and the
    attributes that a user's subclass adds. It does not have the state of a run, such as optimizers and hooks.
    """

    def __getstate__(self) -> dict[str, Any]:
        run_state = {name for name in vars(self._with_settings(vars(self))) if name.startswith("_")}
        return {
            n: v for n, v in vars(self).items() if n not in run_state and not (n[0] == "_" and hasattr(type(self), n))
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({**vars(self._with_settings(state)), **state})

    def _with_settings(self, settings: Mapping[str, Any]) -> Callback:
        package_class = next(cls for cls in type(self).__mro__ if cls.__module__.startswith("cpq_lightning."))
        names = inspect.signature(package_class).parameters
        return package_class(**{name: settings[name] for name in names if name in settings})

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        # Lightning does not call teardown after an exception.
        self.teardown(trainer, pl_module, "fit")


class MisconfigurationException(CPQError, _MisconfigurationException):
    """Lightning's exception of this name, for both packages."""


class NotResumable(ResumeError, MisconfigurationException):
    """A run cannot be resumed from this checkpoint."""


def is_a(thing: object, *names: str) -> bool:
    """Whether an object is an instance of one of these classes, by class name, which is the same in both packages."""
    return any(cls.__name__ in names for cls in type(thing).__mro__)


def _add_bases(package: ModuleType) -> None:
    """Add the other package's classes to the bases of the classes here; this includes existing callbacks."""
    other_exception = import_module(f"{package.__name__}.utilities.exceptions").MisconfigurationException
    for cls, base in ((Callback, package.Callback), (MisconfigurationException, other_exception)):
        # If one package name is an alias of the other, both classes are the same.
        if not issubclass(cls, base):
            cls.__bases__ = (*cls.__bases__, base)


class _OtherFinder(MetaPathFinder):
    """Detects the import of the other package, and delegates it to the finders after this one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _OTHER:
            return None
        later_finders = sys.meta_path[sys.meta_path.index(self) + 1 :]
        specs = (finder.find_spec(fullname, path, target) for finder in later_finders if hasattr(finder, "find_spec"))
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _OtherLoader(spec.loader)
        return spec


class _OtherLoader(Loader):
    """Delegates to another loader, and adds the bases once the module is loaded."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Give the module its real loader, as importlib.util.LazyLoader does.
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _add_bases(module)


sys.meta_path.insert(0, _OtherFinder())
if sys.modules.get(_OTHER) is not None:
    # Import it rather than take it from sys.modules: another thread may still be importing it.
    _add_bases(import_module(_OTHER))
