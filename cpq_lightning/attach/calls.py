"""How a model is called with what people have: tensors, tuples, dicts, and batches of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from cpq_lightning.attach.wrapping import unwrapped

# Positional and keyword arguments.
Call = tuple[tuple[Any, ...], dict[str, Any]]


def forward_signature(model: nn.Module) -> inspect.Signature:
    """The arguments of a model's forward, of what is wrapped in a wrapped one."""
    return inspect.signature(unwrapped(model).forward)


def as_call(model: nn.Module, inputs: Any) -> Call:
    """The call that example inputs, or samples, are meant for.

    A tuple or list holds positional arguments, a mapping arguments by name, as a LightningModule's
    ``example_input_array`` does. Where the forward cannot take them so, and has no argument of the name of a key,
    either is its one argument; so is anything else.

    Raises:
        TypeError: the forward takes them neither way.
    """
    if isinstance(inputs, tuple | list):
        return _first_taken(model, [(tuple(inputs), {}), ((inputs,), {})])
    return _first_taken(model, _as_mapping(model, inputs))


def as_batch_call(model: nn.Module, batch: Any) -> Call:
    """The call that a batch is meant for: its first element is the input, where it is a tuple or list.

    An input that is a mapping holds arguments by name, where the forward takes them so; any other is its one argument,
    or, of a tuple or list, the forward's positional arguments, where it takes more than one.

    Raises:
        ValueError: the batch is an empty tuple or list.
        TypeError: the forward takes the input neither way.
    """
    if isinstance(batch, tuple | list):
        if not batch:
            raise ValueError("a batch is an empty tuple or list: its first element must be the input.")
        batch = batch[0]
    if isinstance(batch, tuple | list):
        return _first_taken(model, [((batch,), {}), (tuple(batch), {})])
    return _first_taken(model, _as_mapping(model, batch))


def _as_mapping(model: nn.Module, inputs: Any) -> list[Call]:
    if not isinstance(inputs, Mapping) or not all(isinstance(key, str) for key in inputs):
        return [((inputs,), {})]
    named: Call = ((), dict(inputs))
    signature = _signature(model)
    meant = signature is not None and any(key in signature.parameters for key in inputs)
    return [named] if meant else [named, ((inputs,), {})]


def _signature(model: nn.Module) -> inspect.Signature | None:
    try:
        return forward_signature(model)
    except ValueError:
        # Of compiled languages: what it takes shows when it is called.
        return None


def _first_taken(model: nn.Module, calls: list[Call]) -> Call:
    signature = _signature(model)
    if signature is None:
        return calls[0]
    reasons = []
    for args, kwargs in calls:
        try:
            signature.bind(*args, **kwargs)
            return args, kwargs
        except TypeError as error:
            reasons.append(str(error))
    raise TypeError(
        f"{type(unwrapped(model)).__name__}.forward{signature} cannot be called with {_told(calls[0])} "
        f"({'; '.join(dict.fromkeys(reasons))})"
    )


def _told(call: Call) -> str:
    args, kwargs = call
    told = [type(a).__name__ for a in args] + [f"{name}: {type(a).__name__}" for name, a in kwargs.items()]
    return f"({', '.join(told)})"
