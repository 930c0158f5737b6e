"""Trained models back from their ``state_dict``, by whichever code loads it.

torch has no hook by which a module without quantizers could be asked before a ``state_dict`` is loaded into it. So
importing this module puts a check in front of :meth:`torch.nn.Module.load_state_dict`: it looks at the names of a
state, and passes on whatever has no quantizers.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from cpq_lightning.attach.layers import is_attached
from cpq_lightning.attach.rebuild import attach_state, check_same_quantizers, plain_in, quantized_in

# Parts of the names of what only a quantized model has.
_OF_QUANTIZERS = ("weight_quantizer", "input_quantizer", "product_operands", "product_state")
# How many states with quantizers the innermost context has met; None outside of one. A thread begins outside.
_met: ContextVar[list[int] | None] = ContextVar("cpq_lightning_loading", default=None)


# Asked of a module outside of one, whether its quantizers are to be attached all the same.
_expected: list[Callable[[nn.Module], bool]] = []


# Asked of a module that does not fit a state: how its settings differ from those of the state, a sentence.
_explanations: list[Callable[[nn.Module], str]] = []


def explain_with(explanation: Callable[[nn.Module], str]) -> None:
    """Add to refusals what somebody knows of the settings that a state was trained with."""
    _explanations.append(explanation)


def attach_where(expected: Callable[[nn.Module], bool]) -> None:
    """Attach on loading outside of :func:`loading` too, where a module is known to be quantized."""
    _expected.append(expected)


@contextmanager
def loading() -> Iterator[None]:
    """Within it, any ``load_state_dict`` that meets the state of a quantized model attaches its quantizers first.

    So a package that saves a ``state_dict`` and builds the module itself loads what was trained, to the bit, by its own
    means; the module is quantized then, as :func:`~cpq_lightning.attach` leaves it. It holds for the thread that has
    entered it, for whole modules and for parts of them; a module that is attached already is loaded as ever. Where
    loading fails the module is left as it was. A warning says so where no such state was met.

    Raises:
        ValueError: from ``load_state_dict``, where a quantizer does not fit its layer.

    Example:
        ``with cpq_lightning.loading(): model = TheirModel.load("model.pt")``
    """
    with attaching() as met:
        yield
    if not met[0]:
        warnings.warn(
            "Within cpq_lightning.loading() no load_state_dict has met the state of a quantized model: what was loaded "
            "is as it was built. Was it saved before CPQCallback, or attach, had quantized it, or was its state read "
            "in another thread?",
            stacklevel=3,
        )


@contextmanager
def attaching() -> Iterator[list[int]]:
    """:func:`loading` without the warning; yields the number of states with quantizers met so far, in a list."""
    met = [0]
    token = _met.set(met)
    try:
        yield met
    finally:
        _met.reset(token)
        outer = _met.get()
        if outer is not None:
            outer[0] += met[0]


_load_state_dict = nn.Module.load_state_dict


@functools.wraps(_load_state_dict)
def _checked(self: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    if not isinstance(state_dict, Mapping):
        return _load_state_dict(self, state_dict, *args, **kwargs)
    if not quantized_in(state_dict):
        if is_attached(self):
            return _load_full_precision(self, state_dict, *args, **kwargs)
        return _load_state_dict(self, state_dict, *args, **kwargs)
    met = _met.get()
    if met is not None:
        met[0] += 1
    names = plain_in(self, state_dict)
    if not names:
        check_same_quantizers(self, state_dict, args[0] if args else kwargs.get("strict", True), _explained(self))
        return _load_state_dict(self, state_dict, *args, **kwargs)
    if met is None and is_attached(self):
        raise RuntimeError(
            "Load it within `with cpq_lightning.loading():`, which attaches what the state has, or quantize "
            f"{type(self).__name__} with the settings of the state (a Lightning checkpoint holds them under "
            f"'cpq_lightning'). This state_dict has quantizers that {type(self).__name__} lacks, in {len(names)} "
            f"modules, such as {names[0]!r}: it was trained with other settings. {_explained(self)}".rstrip()
        )
    if met is None and not any(expected(self) for expected in _expected):
        own = type(self).__name__
        cure = "Load it within `with cpq_lightning.loading():`"
        if hasattr(self, "load_from_checkpoint"):
            cure = (
                f"Load it with `cpq_lightning.load_checkpoint({own}, path)`, or within "
                "`with cpq_lightning.loading():`; give a Trainer the CPQCallback of the run"
            )
        raise RuntimeError(
            f"{cure}. This state_dict is of a quantized model, and {own} has no quantizers in {len(names)} of the "
            f"modules that were quantized, such as {names[0]!r}: it would evaluate as another network. (For the "
            "full-precision weights alone, leave out the keys with '_quantizer.' and 'product_'.)"
        )
    undo = attach_state(self, state_dict)
    try:
        return _load_state_dict(self, state_dict, *args, **kwargs)
    except BaseException:
        undo()
        raise


def _explained(model: nn.Module) -> str:
    found = next(filter(None, (explanation(model) for explanation in _explanations)), "")
    return f"{found} " if found else ""


def _load_full_precision(model: nn.Module, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
    """Full-precision weights for a quantized model: its layers forget their ranges, and no key of theirs is missing."""
    result = _load_state_dict(model, state, strict=False, assign=assign)
    missing = [key for key in result.missing_keys if not {*_OF_QUANTIZERS}.intersection(key.split("."))]
    if strict and (missing or result.unexpected_keys):
        # torch's own error, of the keys that count.
        names = {"Missing key(s)": missing, "Unexpected key(s)": result.unexpected_keys}
        said = "".join(
            f"\n\t{what} in state_dict: {', '.join(map(repr, keys))}. " for what, keys in names.items() if keys
        )
        raise RuntimeError(f"Error(s) in loading state_dict for {type(model).__name__}:{said}")
    warnings.warn(
        f"The state_dict is of a full-precision {type(model).__name__}: its weights were loaded, and the ranges of the "
        "quantizers are not known any more. The next fit or calibrate finds them.",
        stacklevel=3,
    )
    return type(result)(missing if strict else result.missing_keys, result.unexpected_keys)


# A module that is reloaded must not stand in front of itself.
if not hasattr(_load_state_dict, "__wrapped__"):
    nn.Module.load_state_dict = _checked  # type: ignore[method-assign]
