"""Samples of a model's input: what an export is traced with, and verified on."""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cpq_lightning.attach.calls import Call, as_call, forward_signature
from cpq_lightning.attach.wrapping import unwrapped
from cpq_lightning.export.calls import Form, named_outputs, split_call

_MOST_BYTES = 1 << 23


@dataclass(frozen=True)
class Samples:
    """Inputs of a model: the tensors of its arguments, the same number of samples in each, and how it is called.

    Attributes:
        inputs: The tensors, in the order of the arguments, of the shape (samples, ...). One without a dimension counts
            for all samples.
        real: Whether they are data of the run, rather than random numbers of its shape.
        form: The call that the tensors are parts of; by default each is a positional argument.
    """

    inputs: tuple[Tensor, ...]
    real: bool = True
    form: Form | None = None

    def __post_init__(self) -> None:
        inputs = tuple(_plain(t) for t in self.inputs)
        object.__setattr__(self, "inputs", inputs)
        if self.form is None:
            object.__setattr__(self, "form", split_call((inputs, {}))[1])
        self.call()
        if differ := _differ(inputs):
            raise ValueError(f"samples must be {differ}")

    def __len__(self) -> int:
        return next(len(t) for t in self.inputs if t.dim())

    def call(self) -> Call:
        """Positional and keyword arguments."""
        assert self.form is not None
        return self.form.call(self.inputs)

    def places(self, model: nn.Module) -> tuple[list[str], dict[str, Any]]:
        """The names of the tensors, and the constants by name: see :meth:`~cpq_lightning.export.calls.Form.places`."""
        assert self.form is not None
        return self.form.places(model)

    def fit(self, model: nn.Module) -> bool:
        """Whether a model's forward takes arguments like these."""
        args, kwargs = self.call()
        try:
            forward_signature(model).bind(*args, **kwargs)
        except TypeError:
            return False
        return True

    def for_arguments_of(self, other: Samples, model: nn.Module) -> Samples | None:
        """These samples for the arguments alone that others give a model; ``None`` where they lack one of them."""
        signature = forward_signature(model)
        own, wanted = (signature.bind(*args, **kwargs).arguments for args, kwargs in (self.call(), other.call()))
        if own.keys() == wanted.keys():
            return self
        if wanted.keys() - own.keys():
            return None
        left = inspect.BoundArguments(signature, OrderedDict((n, v) for n, v in own.items() if n in wanted))
        return replace(_of_call((left.args, left.kwargs), model), real=self.real)

    def pair(self) -> Samples:
        """Two samples to trace with: of one, torch would take the size for a constant."""
        return self._each(lambda t: t[:2] if len(t) > 1 else t.repeat(2, *[1] * (t.dim() - 1)))

    def first(self, most: int) -> Samples:
        """At most so many of them."""
        return self._each(lambda t: t[:most])

    def batches(self, size: int) -> list[Samples]:
        """The samples in batches of at most ``size``."""
        return [self._each(lambda t, i=i: t[i : i + size]) for i in range(0, len(self), size)]

    def _each(self, change: Callable[[Tensor], Tensor]) -> Samples:
        return replace(self, inputs=tuple(change(t) if t.dim() else t for t in self.inputs))

    @staticmethod
    def of(value: Any, model: nn.Module | None = None) -> Samples:
        """Samples from a tensor, from positional arguments in a tuple or list, from arguments by name in a mapping, or
        what are some already.

        Arguments may be tuples, lists, dicts and classes that torch's pytree knows, with tensors in them, and numbers,
        strings and None, which stay as they are. What a model takes as its one argument is that: see
        :func:`~cpq_lightning.attach.calls.as_call`. For positional and named arguments see :meth:`called_with`.

        Args:
            value: What holds them.
            model: The model that takes them; without it a tuple, list or mapping is never the one argument.

        Raises:
            TypeError: the model cannot be called with it, or it has something else in it.
            ValueError: tensors differ in their number of samples.
        """
        if isinstance(value, Samples):
            return value
        if model is not None:
            try:
                args, kwargs = as_call(model, value)
            except TypeError as error:
                raise TypeError(
                    f"samples: {error}: give positional arguments as a tuple, arguments by name as a dict, or both as "
                    "Samples.called_with(...)."
                ) from None
        elif isinstance(value, Mapping):
            args, kwargs = (), dict(value)
        else:
            args, kwargs = tuple(value) if isinstance(value, tuple | list) else (value,), {}
        return _of_call((args, kwargs), model)

    @staticmethod
    def called_with(*args: Any, **kwargs: Any) -> Samples:
        """Samples for a call with these arguments, in this form.

        Example:
            ``Samples.called_with(images, mask=masks, scale=2.0)``
        """
        return _of_call((args, kwargs))

    @staticmethod
    def joined(batches: Sequence[Samples]) -> Samples:
        """The samples of several batches for the same call.

        Raises:
            ValueError: they are for different calls.
        """
        first = batches[0]
        fixed = [[t for t in batch.inputs if not t.dim()] for batch in batches]
        if any(batch.form != first.form for batch in batches) or any(f != fixed[0] for f in fixed):
            raise ValueError(
                "samples: what the model is called with differs between batches, in more than its samples: in other "
                "arguments, their containers, constants, or tensors without a dimension."
            )
        tensors = zip(*(batch.inputs for batch in batches), strict=True)
        return replace(first, inputs=tuple(torch.cat(ts) if ts[0].dim() else ts[0] for ts in tensors))

    @staticmethod
    def synthetic(shapes: Sequence[Sequence[int]], count: int = 16) -> Samples:
        """Random numbers of normal distribution, always the same."""
        generator = torch.Generator().manual_seed(0)
        return Samples(tuple(torch.randn(count, *s, generator=generator) for s in shapes), real=False)


def _of_call(call: Call, model: nn.Module | None = None) -> Samples:
    try:
        tensors, form = split_call(call, model)
    except TypeError as error:
        raise TypeError(f"samples: {error}") from None
    if not tensors:
        raise TypeError(f"samples must be tensors, got {[type(leaf).__name__ for leaf in form.leaves]}.")
    return Samples(tuple(tensors), form=form)


def _differ(tensors: Sequence[Tensor]) -> str | None:
    """What is wrong with tensors that do not have the same number of samples, and at least one."""
    sizes = {len(t) for t in tensors if t.dim()}
    if len(sizes) == 1 and 0 not in sizes:
        return None
    shapes = [tuple(t.shape) for t in tensors]
    return f"tensors with the same number of samples, at least one, in their first dimension, got {shapes}."


@dataclass
class _Recording:
    most: int
    samples: Samples | None = None
    obstacle: str | None = None


# Beside the modules, not in them: a module may be pickled into a checkpoint, as a hyperparameter of another, and a
# checkpoint carries no data.
_recordings: WeakKeyDictionary[nn.Module, _Recording] = WeakKeyDictionary()


def record_samples(model: nn.Module, most: int = 16, *, again: bool = False) -> None:
    """Let the model's next forward leave a few of its inputs; see :func:`recorded_samples`.

    Those of an earlier run are forgotten, which is all that is done where ``most`` is 0. With ``again`` they are kept,
    and what is missing is recorded.
    """
    model = unwrapped(model)
    if not again:
        _recordings.pop(model, None)
    if not most or recorded_samples(model) is not None:
        return
    _recordings.setdefault(model, _Recording(most))
    if _record not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_record, with_kwargs=True)  # type: ignore[arg-type]
        model.register_forward_hook(_look)  # type: ignore[arg-type]


def stop_recording_samples(model: nn.Module) -> None:
    """Take the hooks of :func:`record_samples` away where no forward has."""
    model = unwrapped(model)
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for handle, hook in list(hooks.items()):
            if hook in (_record, _look):
                del hooks[handle]
                model._forward_pre_hooks_with_kwargs.pop(handle, None)


@torch.compiler.disable
def _record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # DistributedDataParallel calls a LightningModule with a batch, its forward being a training step then.
    if "forward" in model.__dict__:
        return
    recording = _recordings.get(model)
    if recording is None:
        # A copy of a model that records has its hooks, and records nothing.
        stop_recording_samples(model)
        return
    try:
        tensors, form = split_call((args, kwargs), model)
    except TypeError as error:
        recording.obstacle = str(error)
        return
    if differ := _differ(tensors):
        recording.obstacle = f"an export takes {differ}"
        return
    each = sum(math.prod(t.shape[1:]) * t.element_size() for t in tensors if t.dim())
    count = max(1, min(recording.most, _MOST_BYTES // max(1, each)))
    # Copies: a forward may write to its inputs.
    kept = (t.detach()[:count] if t.dim() else t.detach() for t in tensors)
    recording.samples = Samples(tuple(t.cpu().clone() for t in kept), form=form)
    recording.obstacle = None


@torch.compiler.disable
def _look(model: nn.Module, args: Any, output: Any) -> None:
    recording = _recordings.get(model)
    if recording is None or recording.samples is None:
        return
    try:
        named_outputs(output)
    except TypeError as error:
        recording.obstacle = str(error)
    stop_recording_samples(model)


def recorded_samples(model: nn.Module) -> Samples | None:
    """What :func:`record_samples` has recorded."""
    found = _recordings.get(unwrapped(model))
    return None if found is None else found.samples


def export_obstacle(model: nn.Module) -> str | None:
    """What the forward that :func:`record_samples` has seen takes, or returns, that no export can hold."""
    found = _recordings.get(unwrapped(model))
    return None if found is None else found.obstacle


def _plain(tensor: Tensor) -> Tensor:
    """On the CPU, in float32 as artefacts compute, whatever precision the run had."""
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor
