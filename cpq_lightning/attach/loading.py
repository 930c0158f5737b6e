"""Load trained quantized models from a ``state_dict``, whichever code loads it.

torch has no hook that runs before a ``state_dict`` is loaded into a module without quantizers. Therefore, importing
this module wraps :meth:`torch.nn.Module.load_state_dict` with a check of the names in the ``state_dict``; a state
without quantizers passes unchanged.
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
from cpq_lightning.errors import StateDictError

# Parts of ``state_dict`` names that only a quantized model has.
_OF_QUANTIZERS = ("weight_quantizer", "input_quantizer", "product_operands", "product_state")
# Number of states with quantizers that the innermost ``loading`` context has seen; None outside of any context. A new
# thread starts outside.
_seen: ContextVar[list[int] | None] = ContextVar("cpq_lightning_loading", default=None)


# Functions of a module: whether to attach its quantizers on loading outside of a ``loading`` context.
_expected: list[Callable[[nn.Module], bool]] = []


# Functions of a module that does not fit a state: a sentence about how its settings differ from those of the state.
_explanations: list[Callable[[nn.Module], str]] = []


def explain_with(explanation: Callable[[nn.Module], str]) -> None:
    """Add to error messages an explanation of the settings that a state was trained with."""
    _explanations.append(explanation)


def attach_where(expected: Callable[[nn.Module], bool]) -> None:
    """Attach on loading outside of :func:`loading` too, for modules that are expected to be quantized."""
    _expected.append(expected)


@contextmanager
def loading() -> Iterator[None]:
    """Context in which ``load_state_dict`` attaches quantizers before it loads the state of a quantized model.

    A package that saves a ``state_dict`` and builds the module itself can thus load a trained model exactly, with its
    usual functions; the module is then quantized, as by :func:`~cpq_lightning.attach`. The context applies to the
    thread that entered it, and to full modules as well as parts of them; modules that are attached already are loaded
    as usual. If loading fails, the module is left unchanged. A warning reports if no such state was loaded.

    Raises:
        StateDictError: from ``load_state_dict``, if a quantizer does not fit its layer.

    Example:
        ``with cpq_lightning.loading(): model = TheirModel.load("model.pt")``
    """
    with attaching() as seen:
        yield
    if not seen[0]:
        warnings.warn(
            "Within cpq_lightning.loading() no load_state_dict has met the state of a quantized model, so the loaded "
            "model has no quantizers. Was the state saved before CPQCallback, or attach, had quantized the model, or "
            "was it loaded in another thread?",
            stacklevel=3,
        )


@contextmanager
def attaching() -> Iterator[list[int]]:
    """:func:`loading` without the warning; yields a list with the number of states with quantizers seen so far."""
    seen = [0]
    token = _seen.set(seen)
    try:
        yield seen
    finally:
        _seen.reset(token)
        outer = _seen.get()
        if outer is not None:
            outer[0] += seen[0]


_load_state_dict = nn.Module.load_state_dict


@functools.wraps(_load_state_dict)
def _load_state_dict_checked(self: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    if not isinstance(state_dict, Mapping):
        return _load_state_dict(self, state_dict, *args, **kwargs)
    if not quantized_in(state_dict):
        if is_attached(self):
            return _load_full_precision(self, state_dict, *args, **kwargs)
        return _load_state_dict(self, state_dict, *args, **kwargs)
    seen = _seen.get()
    if seen is not None:
        seen[0] += 1
    names = plain_in(self, state_dict)
    if not names:
        check_same_quantizers(self, state_dict, args[0] if args else kwargs.get("strict", True), _explained(self))
        return _load_state_dict(self, state_dict, *args, **kwargs)
    if seen is None and is_attached(self):
        raise StateDictError(
            "Load it within `with cpq_lightning.loading():`, which attaches what the state has, or quantize "
            f"{type(self).__name__} with the settings of the state (a Lightning checkpoint holds them under "
            f"'cpq_lightning'). This state_dict has quantizers that {type(self).__name__} lacks, in {len(names)} "
            f"modules, such as {names[0]!r}: it was trained with other settings. {_explained(self)}".rstrip()
        )
    if seen is None and not any(expected(self) for expected in _expected):
        name = type(self).__name__
        remedy = "Load it within `with cpq_lightning.loading():`"
        if hasattr(self, "load_from_checkpoint"):
            remedy = (
                f"Load it with `cpq_lightning.load_checkpoint({name}, path)`, or within "
                "`with cpq_lightning.loading():`; give a Trainer the CPQCallback of the run"
            )
        raise StateDictError(
            f"{remedy}. This state_dict is of a quantized model, and {name} has no quantizers in {len(names)} of the "
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
    explained = next(filter(None, (explanation(model) for explanation in _explanations)), "")
    return f"{explained} " if explained else ""


def _load_full_precision(model: nn.Module, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
    """Load full-precision weights into a quantized model: ranges are reset, and quantizer keys may be missing."""
    result = _load_state_dict(model, state, strict=False, assign=assign)
    missing = [key for key in result.missing_keys if not {*_OF_QUANTIZERS}.intersection(key.split("."))]
    if strict and (missing or result.unexpected_keys):
        # torch's error, without the keys of the quantizers.
        names = {"Missing key(s)": missing, "Unexpected key(s)": result.unexpected_keys}
        listed = "".join(
            f"\n\t{what} in state_dict: {', '.join(map(repr, keys))}. " for what, keys in names.items() if keys
        )
        raise StateDictError(f"Error(s) in loading state_dict for {type(model).__name__}:{listed}")
    warnings.warn(
        f"The state_dict is of a full-precision {type(model).__name__}: its weights were loaded, and the ranges of the "
        "quantizers are not known any more. The next fit or calibrate finds them.",
        stacklevel=3,
    )
    return type(result)(missing if strict else result.missing_keys, result.unexpected_keys)


# If this module is reloaded, the check must not wrap itself.
if not hasattr(_load_state_dict, "__wrapped__"):
    nn.Module.load_state_dict = _load_state_dict_checked  # type: ignore[method-assign]
