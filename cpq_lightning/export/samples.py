"""Samples of a model's input, which exports use for traces and verification."""

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

# Recorded samples have at most 8 MiB in total, but at least one sample is kept.
_MAX_BYTES = 1 << 23


@dataclass(frozen=True)
class Samples:
    """Inputs of a model: the tensors of its arguments, with the same number of samples in each, and the form of the
    call.

    Attributes:
        inputs: The tensors in the order of the arguments, of the shape (samples, ...). A tensor without dimensions is
            shared by all samples.
        real: Whether the samples are data of the run; ``False`` for random numbers of the same shape.
        form: The structure of the call; by default each tensor is a positional argument.
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
        if requirement := _unmet_requirement(inputs):
            raise ValueError(f"samples must be {requirement}")

    def __len__(self) -> int:
        return next(len(t) for t in self.inputs if t.dim())

    def call(self) -> Call:
        """The positional and keyword arguments."""
        assert self.form is not None
        return self.form.call(self.inputs)

    def places(self, model: nn.Module) -> tuple[list[str], dict[str, Any]]:
        """The names of the tensors, and the constants by name: see :meth:`~cpq_lightning.export.calls.Form.places`."""
        assert self.form is not None
        return self.form.places(model)

    def fit(self, model: nn.Module) -> bool:
        """Whether the samples match the signature of a model's forward."""
        args, kwargs = self.call()
        try:
            forward_signature(model).bind(*args, **kwargs)
        except TypeError:
            return False
        return True

    def for_arguments_of(self, other: Samples, model: nn.Module) -> Samples | None:
        """The samples restricted to the arguments of other samples; ``None`` where such an argument is missing."""
        signature = forward_signature(model)
        present, wanted = (signature.bind(*args, **kwargs).arguments for args, kwargs in (self.call(), other.call()))
        if present.keys() == wanted.keys():
            return self
        if wanted.keys() - present.keys():
            return None
        kept = inspect.BoundArguments(signature, OrderedDict((n, v) for n, v in present.items() if n in wanted))
        return replace(_of_call((kept.args, kept.kwargs), model), real=self.real)

    def pair(self) -> Samples:
        """Two samples for a trace: torch would treat a batch size of one as a constant."""
        return self._map(lambda t: t[:2] if len(t) > 1 else t.repeat(2, *[1] * (t.dim() - 1)))

    def first(self, count: int) -> Samples:
        """The first ``count`` samples, or all where there are fewer."""
        return self._map(lambda t: t[:count])

    def batches(self, size: int) -> list[Samples]:
        """The samples in batches of at most ``size``."""
        return [self._map(lambda t, i=i: t[i : i + size]) for i in range(0, len(self), size)]

    def _map(self, change: Callable[[Tensor], Tensor]) -> Samples:
        return replace(self, inputs=tuple(change(t) if t.dim() else t for t in self.inputs))

    @staticmethod
    def of(value: Any, model: nn.Module | None = None) -> Samples:
        """Samples from a tensor, from a tuple or list of positional arguments, or from a mapping of arguments by name.

        Arguments may be tuples, lists, dicts and classes that torch's pytree knows, with tensors in them, and numbers,
        strings and None, which stay unchanged. A tuple, list or mapping is the only argument where the model's forward
        takes it as such, see :func:`~cpq_lightning.attach.calls.as_call`. For a mix of positional and named arguments
        see :meth:`called_with`.

        Args:
            value: The arguments; :class:`Samples` are returned unchanged.
            model: The model that is called; without it a tuple, list or mapping is never the only argument.

        Raises:
            TypeError: the model cannot be called with the arguments, or they contain a value of another type.
            ValueError: tensors differ in the size of their first dimension, the number of samples.
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
        """Samples for a call with these positional and keyword arguments.

        Example:
            ``Samples.called_with(images, mask=masks, scale=2.0)``
        """
        return _of_call((args, kwargs))

    @staticmethod
    def joined(batches: Sequence[Samples]) -> Samples:
        """Concatenate the samples of several batches for the same call.

        Raises:
            ValueError: the batches are for different calls.
        """
        first = batches[0]
        shared = [[t for t in batch.inputs if not t.dim()] for batch in batches]
        if any(batch.form != first.form for batch in batches) or any(s != shared[0] for s in shared):
            raise ValueError(
                "samples: the call of the model differs between batches, in more than its samples: in arguments, their "
                "containers, constants, or tensors without dimensions."
            )
        tensors = zip(*(batch.inputs for batch in batches), strict=True)
        return replace(first, inputs=tuple(torch.cat(ts) if ts[0].dim() else ts[0] for ts in tensors))

    @staticmethod
    def synthetic(shapes: Sequence[Sequence[int]], count: int = 16) -> Samples:
        """Random samples with a standard normal distribution and a fixed seed; a shape is that of one sample."""
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


def _unmet_requirement(tensors: Sequence[Tensor]) -> str | None:
    """The requirement of at least one sample, and the same number in each tensor, as text; ``None`` where it is met."""
    sizes = {len(t) for t in tensors if t.dim()}
    if len(sizes) == 1 and 0 not in sizes:
        return None
    shapes = [tuple(t.shape) for t in tensors]
    return f"tensors with the same number of samples, at least one, in their first dimension, got {shapes}."


@dataclass
class _Recording:
    max_samples: int
    samples: Samples | None = None
    obstacle: str | None = None


# Recordings are not attributes of the modules: a module may be pickled into a checkpoint, as a hyperparameter of
# another module, and a checkpoint must not contain data.
_recordings: WeakKeyDictionary[nn.Module, _Recording] = WeakKeyDictionary()


def record_samples(model: nn.Module, max_samples: int, *, again: bool = False) -> None:
    """Record at most ``max_samples`` inputs in the next forward of the model, for :func:`recorded_samples`.

    Samples of an earlier run are deleted; where ``max_samples`` is 0, nothing else is done. With ``again`` they are
    kept, and recording starts only where there are none.
    """
    model = unwrapped(model)
    if not again:
        _recordings.pop(model, None)
    if not max_samples or recorded_samples(model) is not None:
        return
    _recordings.setdefault(model, _Recording(max_samples))
    if _record not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_record, with_kwargs=True)  # type: ignore[arg-type]
        model.register_forward_hook(_check_output)  # type: ignore[arg-type]


def stop_recording_samples(model: nn.Module) -> None:
    """Remove the hooks of :func:`record_samples`; a forward that was recorded has removed them already."""
    model = unwrapped(model)
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for handle, hook in list(hooks.items()):
            if hook in (_record, _check_output):
                del hooks[handle]
                model._forward_pre_hooks_with_kwargs.pop(handle, None)


@torch.compiler.disable
def _record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # Under DistributedDataParallel, the forward of a LightningModule is a training step and takes a batch.
    if "forward" in model.__dict__:
        return
    recording = _recordings.get(model)
    if recording is None:
        # A copy of a recording model has the hooks as well, but must not record.
        stop_recording_samples(model)
        return
    try:
        tensors, form = split_call((args, kwargs), model)
    except TypeError as error:
        recording.obstacle = str(error)
        return
    if requirement := _unmet_requirement(tensors):
        recording.obstacle = f"an export takes {requirement}"
        return
    sample_bytes = sum(math.prod(t.shape[1:]) * t.element_size() for t in tensors if t.dim())
    count = max(1, min(recording.max_samples, _MAX_BYTES // max(1, sample_bytes)))
    # The samples are copied because a forward may write to its inputs.
    kept = (t.detach()[:count] if t.dim() else t.detach() for t in tensors)
    recording.samples = Samples(tuple(t.cpu().clone() for t in kept), form=form)
    recording.obstacle = None


@torch.compiler.disable
def _check_output(model: nn.Module, args: Any, output: Any) -> None:
    recording = _recordings.get(model)
    if recording is None or recording.samples is None:
        return
    try:
        named_outputs(output)
    except TypeError as error:
        recording.obstacle = str(error)
    stop_recording_samples(model)


def recorded_samples(model: nn.Module) -> Samples | None:
    """The samples that :func:`record_samples` has recorded."""
    recording = _recordings.get(unwrapped(model))
    return None if recording is None else recording.samples


def export_obstacle(model: nn.Module) -> str | None:
    """The reason why the recorded forward cannot be exported: an argument or an output of a type that no file can
    contain, or tensors with different numbers of samples; ``None`` where there is no such reason.
    """
    recording = _recordings.get(unwrapped(model))
    return None if recording is None else recording.obstacle


def _plain(tensor: Tensor) -> Tensor:
    """The tensor on the CPU; floats become float32, in which exported files compute, whatever the run's precision."""
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor
