"""Samples of a model's input: what an export is traced with, and verified on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_MOST_BYTES = 1 << 23


@dataclass
class _Recording:
    most: int
    inputs: list[Tensor] = field(default_factory=list)


# Beside the modules, not in them: a module may be pickled into a checkpoint, as a hyperparameter of another, and a
# checkpoint carries no data.
_recordings: WeakKeyDictionary[nn.Module, _Recording] = WeakKeyDictionary()


@dataclass(frozen=True)
class Samples:
    """Inputs of a model, one tensor an argument, the same number of samples in each.

    Attributes:
        inputs: The arguments, shape (samples, ...).
        real: Whether they are data of the run, rather than random numbers of its shape.
    """

    inputs: tuple[Tensor, ...]
    real: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", tuple(_plain(t) for t in self.inputs))
        sizes = {len(t) if t.dim() else 0 for t in self.inputs}
        if len(sizes) != 1 or 0 in sizes:
            raise ValueError(
                "samples must be tensors with the same number of samples, at least one, in their first dimension, got "
                f"{[tuple(t.shape) for t in self.inputs]}."
            )

    def __len__(self) -> int:
        return len(self.inputs[0])

    def pair(self) -> tuple[Tensor, ...]:
        """Two samples to trace with: of one, torch would take the size for a constant."""
        return tuple(t[:2] if len(t) > 1 else t.repeat(2, *[1] * (t.dim() - 1)) for t in self.inputs)

    def batches(self, size: int) -> list[tuple[Tensor, ...]]:
        """The samples in batches of at most ``size``."""
        return list(zip(*(t.split(size) for t in self.inputs), strict=True))

    @staticmethod
    def of(value: Any) -> Samples:
        """Samples from a tensor, a sequence of tensors, or what is one already."""
        if isinstance(value, Samples):
            return value
        inputs = (value,) if isinstance(value, Tensor) else tuple(value)
        if not all(isinstance(t, Tensor) for t in inputs):
            raise TypeError(f"samples must be tensors, got {[type(t).__name__ for t in inputs]}.")
        return Samples(inputs)

    @staticmethod
    def synthetic(shapes: Sequence[Sequence[int]], count: int = 16) -> Samples:
        """Random numbers of normal distribution, always the same."""
        generator = torch.Generator().manual_seed(0)
        return Samples(tuple(torch.randn(count, *s, generator=generator) for s in shapes), real=False)


def record_samples(model: nn.Module, most: int = 16) -> None:
    """Let the model's next forward leave a few of its inputs; see :func:`recorded_samples`.

    Those of an earlier run are forgotten, which is all that is done where ``most`` is 0.
    """
    _recordings.pop(model, None)
    if not most:
        return
    _recordings[model] = _Recording(most)
    if _record not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_record)  # type: ignore[arg-type]


def stop_recording_samples(model: nn.Module) -> None:
    """Take the hook of :func:`record_samples` away where no forward has."""
    for handle, hook in list(model._forward_pre_hooks.items()):
        if hook is _record:
            del model._forward_pre_hooks[handle]


@torch.compiler.disable
def _record(model: nn.Module, args: tuple[Any, ...]) -> None:
    # DistributedDataParallel calls a LightningModule with a batch, its forward being a training step then.
    if "forward" in model.__dict__ or not args or not all(isinstance(a, Tensor) and a.dim() for a in args):
        return
    if len({len(a) for a in args}) != 1 or not len(args[0]):
        return
    # A copy of a model that records has its hook, and records nothing.
    if (recording := _recordings.get(model)) is not None:
        each = sum(math.prod(a.shape[1:]) * a.element_size() for a in args)
        count = max(1, min(recording.most, _MOST_BYTES // max(1, each)))
        recording.inputs = [a[:count].detach().cpu().clone() for a in args]
    stop_recording_samples(model)


def recorded_samples(model: nn.Module) -> Samples | None:
    """What :func:`record_samples` has recorded."""
    found = _recordings.get(model)
    return Samples(tuple(found.inputs)) if found is not None and found.inputs else None


def _plain(tensor: Tensor) -> Tensor:
    """On the CPU, in float32 as artefacts compute, whatever precision the run had."""
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor


def flat_outputs(value: Any) -> list[Tensor]:
    """The tensors that a model returns, alone or within tuples, lists and dicts, in order.

    Raises:
        TypeError: it returns something else.
    """
    if isinstance(value, Tensor):
        return [value.detach()]
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [tensor for v in value.values() for tensor in flat_outputs(v)]
    if isinstance(value, tuple | list):
        return [tensor for v in value for tensor in flat_outputs(v)]
    raise TypeError(f"The model returns {type(value).__name__}: expected tensors, or tuples, lists or dicts of them.")
