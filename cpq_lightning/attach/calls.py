"""Calls of a model with a batch, whose input is a tensor, a tuple, a list or a dict; and calls that leave the model
unchanged.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from cpq_lightning.attach.wrapping import unwrapped

# Positional and keyword arguments.
Call = tuple[tuple[Any, ...], dict[str, Any]]


def forward_signature(model: nn.Module) -> inspect.Signature:
    """The signature of a model's forward; for a wrapped model, of the wrapped module."""
    return inspect.signature(unwrapped(model).forward)


def as_call(model: nn.Module, inputs: Any) -> Call:
    """The arguments with which to call a model on example inputs or samples.

    A tuple or list has positional arguments, and a mapping has arguments by name, as in a LightningModule's
    ``example_input_array``. If the forward does not accept them so, and no key is the name of an argument, the tuple,
    list or mapping is the only argument. Any other input is the only argument too.

    Raises:
        TypeError: the forward accepts neither form.
    """
    if isinstance(inputs, tuple | list):
        return _first_accepted(model, [(tuple(inputs), {}), ((inputs,), {})])
    return _first_accepted(model, _as_mapping(model, inputs))


def as_batch_call(model: nn.Module, batch: Any) -> Call:
    """The arguments with which to call a model on a batch; if it is a tuple or list, its first element is the input.

    A mapping has arguments by name, if the forward accepts them so. Any other input is the only argument; a tuple or
    list has the positional arguments instead, if the forward requires more than one.

    Raises:
        ValueError: the batch is an empty tuple or list.
        TypeError: the forward accepts the input in neither form.
    """
    if isinstance(batch, tuple | list):
        if not batch:
            raise ValueError("a batch is an empty tuple or list: its first element must be the input.")
        batch = batch[0]
    if isinstance(batch, tuple | list):
        return _first_accepted(model, [((batch,), {}), (tuple(batch), {})])
    return _first_accepted(model, _as_mapping(model, batch))


def copied_to(model: nn.Module, call: Call) -> Call:
    """A call with copies of its tensors, on the device and in the floating-point type of a model's parameters."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

    def to_model(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().to(like.device, like.dtype if value.is_floating_point() else None, copy=True)

    args, kwargs = tree_map(to_model, call)
    return args, kwargs


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Restore the modes on exit, without the modules' ``train`` methods, which may do more than that."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Set all modules to evaluation, as :func:`modes_restored` restores them."""
    with modes_restored(model):
        for module in model.modules():
            module.training = False
        yield


@contextmanager
def restored(model: nn.Module, buffers: Collection[Tensor]) -> Iterator[None]:
    """Restore these buffers of a model, and the random state of its devices, on exit."""
    saved = [(buffer, buffer.detach().clone()) for buffer in buffers]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                # Torch refuses to write to an expanded buffer, and to one of inference mode; versions do not show what
                # batch norm writes.
                if type(buffer) is not Tensor or buffer.is_meta or not torch.equal(buffer, value):
                    buffer.copy_(value)


def _as_mapping(model: nn.Module, inputs: Any) -> list[Call]:
    if not isinstance(inputs, Mapping) or not all(isinstance(key, str) for key in inputs):
        return [((inputs,), {})]
    named: Call = ((), dict(inputs))
    signature = _signature(model)
    by_name = signature is not None and any(key in signature.parameters for key in inputs)
    return [named] if by_name else [named, ((inputs,), {})]


def _signature(model: nn.Module) -> inspect.Signature | None:
    try:
        return forward_signature(model)
    except ValueError:
        # Compiled languages give no signature; calling the forward shows whether it accepts the inputs.
        return None


def _first_accepted(model: nn.Module, calls: list[Call]) -> Call:
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
        f"{type(unwrapped(model)).__name__}.forward{signature} cannot be called with {_described(calls[0])} "
        f"({'; '.join(dict.fromkeys(reasons))})"
    )


def _described(call: Call) -> str:
    args, kwargs = call
    arguments = [type(a).__name__ for a in args] + [f"{name}: {type(a).__name__}" for name, a in kwargs.items()]
    return f"({', '.join(arguments)})"
