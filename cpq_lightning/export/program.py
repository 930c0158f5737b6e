"""A ``torch.export`` program of the coded model, and reading one back."""

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

from cpq_lightning.export.calls import dump_spec, forward_replaced
from cpq_lightning.export.integer_model import coded
from cpq_lightning.export.samples import Samples
from cpq_lightning.report.levels import compact_manifest

# In the archive, beside the program.
LEVELS_ENTRY = "levels.json"


def write_program(model: nn.Module, path: str | Path, samples: Samples) -> Path:
    """Write an attached model as a ``torch.export`` program: weights as int8 codes, plain operations of torch.

    Args:
        model: An attached model, trained.
        path: The file; ``.pt2`` is usual.
        samples: Inputs to trace with, which the program is called like; the number of samples stays free.

    Raises:
        ValueError: the model cannot be exported; see :func:`~cpq_lightning.export.integer_model.evaluated`.
        TypeError: the samples come in a class that ``torch.export`` cannot save.
        torch._dynamo.exc.UserError: ``torch.export`` cannot trace its forward.
    """
    path = Path(path)
    if samples.form is not None:
        dump_spec(samples.form)
    program = trace(coded(model), samples)
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={LEVELS_ENTRY: json.dumps(compact_manifest(model))})
    return path


def trace(network: nn.Module, samples: Samples) -> ExportedProgram:
    """Trace a network in evaluation, any number of samples."""
    pair = samples.pair()
    args, kwargs = pair.call()
    shapes, batch = torch.export.ShapesCollection(), torch.export.Dim("batch", min=1)
    for tensor in pair.inputs:
        # One without a dimension counts for all samples.
        if tensor.dim():
            shapes[tensor] = {0: batch}
    with torch.no_grad(), _named_keywords(network, kwargs):
        program = torch.export.export(network, args, kwargs, dynamic_shapes=shapes, strict=False)
    # They would go into the file, and are data of the run.
    program.example_inputs = None
    return program


@contextmanager
def _named_keywords(network: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Let a forward with ``**kwargs`` have a parameter for each: ``torch.export`` writes code that looks them up."""
    own = inspect.signature(network.forward)
    parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    known = {p.name for p in parameters}
    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in kwargs if name not in known]
    with forward_replaced(network, network.forward, own.replace(parameters=parameters)):
        yield


def read_program(path: str | Path) -> ExportedProgram:
    """Load a program, refusing whatever in it would have to be unpickled into more than tensors."""
    with _tensors_only(), Path(path).open("rb") as file:
        return torch.export.load(file)


@contextmanager
def _tensors_only() -> Iterator[None]:
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
