"""Writing the integer model as a ``torch.export`` program, and reading such a program."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from cpq_lightning.export.calls import dump_spec, forward_replaced, in_known_containers
from cpq_lightning.export.integer_model import to_integer_model
from cpq_lightning.export.samples import Samples
from cpq_lightning.report.levels import compact_manifest

# Extra file in the archive of the program.
LEVELS_ENTRY = "levels.json"


def write_program(model: nn.Module, path: str | Path, samples: Samples) -> None:
    """Write an attached model as a ``torch.export`` program with int8 weight codes and plain operations of torch.

    Args:
        model: An attached model, trained.
        path: The file to write; the usual suffix is ``.pt2``.
        samples: Inputs for the trace. The program is called with arguments of the same structure, and any number of
            samples.

    Raises:
        ValueError: the model cannot be exported; see :func:`~cpq_lightning.export.integer_model.evaluated`.
        TypeError: ``torch.export`` cannot save the class of an argument.
        torch._dynamo.exc.UserError: ``torch.export`` cannot trace the forward.
    """
    if samples.form is not None:
        dump_spec(samples.form)
    program = trace(to_integer_model(model), samples)
    with Path(path).open("wb") as file:
        torch.export.save(program, file, extra_files={LEVELS_ENTRY: json.dumps(compact_manifest(model))})


def trace(network: nn.Module, samples: Samples) -> ExportedProgram:
    """Trace a network in evaluation for any number of samples."""
    pair = samples.pair()
    args, kwargs = pair.call()
    shapes, batch = torch.export.ShapesCollection(), torch.export.Dim("batch", min=1)
    for tensor in pair.inputs:
        # A tensor without dimensions is shared by all samples.
        if tensor.dim():
            shapes[tensor] = {0: batch}
    with torch.no_grad(), _traceable(network, kwargs):
        program = torch.export.export(network, args, kwargs, dynamic_shapes=shapes, strict=False)
    # The file must not contain data of the run.
    program.example_inputs = None
    return program


@contextmanager
def _traceable(network: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Give a forward with ``**kwargs`` one named parameter per keyword: the code that ``torch.export`` generates looks
    arguments up by parameter name. It returns containers that ``torch.export`` knows.
    """
    original_forward = network.forward
    signature = inspect.signature(original_forward)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    known = {p.name for p in parameters}
    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in kwargs if name not in known]

    def forward(*args: Any, **kwargs: Any) -> Any:
        return in_known_containers(original_forward(*args, **kwargs))

    with forward_replaced(network, forward, signature.replace(parameters=parameters)):
        yield


def read_program(path: str | Path) -> ExportedProgram:
    """Load a program; only tensors are unpickled from the file, anything else raises an error."""
    with _tensors_only(), Path(path).open("rb") as file:
        return torch.export.load(file)


@contextmanager
def _tensors_only() -> Iterator[None]:
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    previous = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if previous is None:
            del os.environ[name]
        else:
            os.environ[name] = previous
