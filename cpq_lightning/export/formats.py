"""The formats of exported files: how each is written and loaded, and the packages that it requires."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from torch import nn

from cpq_lightning.attach.attach import detach
from cpq_lightning.export.integer_model import evaluated
from cpq_lightning.export.packed import write_packed
from cpq_lightning.export.program import write_program
from cpq_lightning.export.runtimes import PackedArtefact, ProgramArtefact
from cpq_lightning.export.samples import Samples
from cpq_lightning.export.verify import Artefact
from cpq_lightning.extras import require

Format = Literal["packed", "onnx", "torch"]
# The integer type of the codes in an ONNX file.
Container = Literal["int8", "int4"]
CONTAINERS: tuple[Container, ...] = get_args(Container)


@dataclass(frozen=True)
class Job:
    """One file to write: an attached model, the file, and the arguments of :func:`~cpq_lightning.export_model`."""

    model: nn.Module
    path: Path
    samples: Samples
    container: Container = "int8"
    architecture: Mapping[str, Any] | None = None


class FileFormat(NamedTuple):
    """What an export must know of a format.

    Attributes:
        suffix: Suffix of the file.
        write: Writes the file.
        load: Loads the file in its runtime, for verification.
        traces: Whether writing runs a forward on the samples. If it does, arguments that are no tensors are constants
            of the file.
        extra: The extra with the packages that the format needs; ``None`` if it needs none.
        write_exact: Writes the file without rounding that ``write`` adds for speed, where verification refuses that;
            ``None`` if ``write`` adds none.
        code_types: The layers of a written file by the integer type of their codes; ``None`` where codes have exactly
            the width of their layer.
    """

    suffix: str
    write: Callable[[Job], Any]
    load: Callable[[Job], Artefact]
    traces: bool = True
    extra: str | None = None
    write_exact: Callable[[Job], Any] | None = None
    code_types: Callable[[Path], dict[str, list[str]]] | None = None


def _load_packed(job: Job) -> Artefact:
    return PackedArtefact(job.path, None if job.architecture is not None else detach(evaluated(job.model)))


def _write_onnx(job: Job, round_biases: bool = True) -> None:
    from cpq_lightning.export.onnx.write import write_onnx

    settings = {"container": job.container, "architecture": job.architecture, "round_biases": round_biases}
    write_onnx(job.model, job.path, job.samples, **settings)


def _onnx_code_types(path: Path) -> dict[str, list[str]]:
    from cpq_lightning.export.onnx.store import code_types

    return code_types(path)


def _load_onnx(job: Job) -> Artefact:
    from cpq_lightning.export.onnx.runtime import OnnxArtefact

    return OnnxArtefact(job.path)


FORMATS: dict[Format, FileFormat] = {
    "packed": FileFormat(
        ".safetensors",
        write=lambda job: write_packed(job.model, job.path, architecture=job.architecture),
        load=_load_packed,
        traces=False,
    ),
    "onnx": FileFormat(
        ".onnx",
        write=_write_onnx,
        load=_load_onnx,
        extra="onnx",
        write_exact=lambda job: _write_onnx(job, round_biases=False),
        code_types=_onnx_code_types,
    ),
    "torch": FileFormat(
        ".pt2",
        write=lambda job: write_program(job.model, job.path, job.samples),
        load=lambda job: ProgramArtefact(job.path),
    ),
}


def check_formats(formats: Sequence[str]) -> None:
    """Raise an error for unknown formats, and for formats whose packages are not installed.

    Raises:
        ValueError: a format is unknown.
        ImportError: packages are missing; the message names the packages to install.
    """
    for format in formats:
        if format not in FORMATS:
            raise ValueError(f"format must be one of {tuple(FORMATS)}, got {format!r}.")
        if extra := FORMATS[format].extra:
            require(extra.upper(), extra)
