"""A ``torch.export`` program of the coded model, and reading one back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram

from cpq_lightning.export.coded import coded
from cpq_lightning.export.levels import compact_manifest
from cpq_lightning.export.samples import Samples

# In the archive, beside the program.
LEVELS_ENTRY = "levels.json"


def write_program(model: nn.Module, path: str | Path, samples: Samples) -> Path:
    """Write an attached model as a ``torch.export`` program: weights as int8 codes, plain operations of torch.

    Args:
        model: An attached model, trained.
        path: The file; ``.pt2`` is usual.
        samples: Inputs to trace with; the number of samples stays free.

    Raises:
        ValueError: the model cannot be exported; see :func:`~cpq_lightning.export.coded.evaluated`.
        torch._dynamo.exc.UserError: ``torch.export`` cannot trace its forward.
    """
    path = Path(path)
    program = trace(coded(model), samples)
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={LEVELS_ENTRY: json.dumps(compact_manifest(model))})
    return path


def trace(network: nn.Module, samples: Samples) -> ExportedProgram:
    """Trace a network in evaluation, any number of samples."""
    inputs = samples.pair()
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        return torch.export.export(network, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs), strict=False)


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
