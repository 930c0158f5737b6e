"""Export of a trained model to a file that is verified against the model."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cpq_lightning.attach.attach import detach
from cpq_lightning.attach.layers import QuantizedLayer, bypassed, quantized_layers
from cpq_lightning.attach.origin import full_precision_layers
from cpq_lightning.attach.wrapping import unwrapped
from cpq_lightning.export.calls import Constant, named_outputs
from cpq_lightning.export.formats import CONTAINERS, FORMATS, Container, Format, Job, check_formats
from cpq_lightning.export.integer_model import check_exportable, evaluated, uncalled
from cpq_lightning.export.samples import Samples
from cpq_lightning.export.verify import MismatchError, Verification, verify
from cpq_lightning.files import replacing
from cpq_lightning.report.levels import full_precision_messages, manifest

log = logging.getLogger("cpq_lightning")


@dataclass(frozen=True)
class Latency:
    """Latency of one sample on the CPU of this machine. Both networks run in turn, so that each pair of runs has the
    same conditions.

    Attributes:
        full_precision: Median time of the full-precision network, in seconds.
        quantized: Median time of the exported file, in seconds.
        speedup: Median over the pairs of runs of the full-precision time divided by the quantized time.
    """

    full_precision: float
    quantized: float
    speedup: float


@dataclass(frozen=True)
class Export:
    """The result of an export.

    Attributes:
        path: The written file.
        format: ``"packed"``, ``"onnx"`` or ``"torch"``.
        container: ONNX only: the integer type of the stored codes.
        verification: The result of the verification; ``None`` where it was switched off.
        latency: ONNX only: the measured latency; ``None`` where it was not requested.
        float_bytes: Size of the model in float32.
        file_bytes: Size of the file.
        weight_bits: Average bits over the quantized weights, without first and last layers; ``None`` where there are no
            such weights.
        act_bits: The same for activations.
        full_precision: Layers whose weight nothing quantizes, such as recurrent layers.
        constants: Arguments by name that are no tensors, and that the file contains with the values of the samples.
        code_types: ONNX only: the layers by the integer type that holds the codes of their weights, such as ``"INT4"``.
        balanced: Layers whose weight has a balanced grid. Its codes are odd integers, which take one bit more than the
            width in an integer type.
    """

    path: Path
    format: Format
    container: Container | None
    verification: Verification | None
    latency: Latency | None
    float_bytes: int
    file_bytes: int
    weight_bits: float | None
    act_bits: float | None
    full_precision: tuple[str, ...] = ()
    constants: Mapping[str, Constant] = field(default_factory=dict)
    code_types: Mapping[str, Sequence[str]] = field(default_factory=dict)
    balanced: tuple[str, ...] = ()


def export_model(
    model: nn.Module,
    folder: str | Path,
    *,
    format: Format = "packed",
    samples: Any,
    name: str = "model",
    container: Container = "int8",
    architecture: Mapping[str, Any] | None = None,
    verify: bool = True,
    latency: bool = False,
) -> Export:
    """Write an attached model as one file, and verify that the file computes the same as the model.

    The file is loaded in its runtime and compared with the model before it is moved into the folder; see
    :func:`~cpq_lightning.export.verify.verify`. If anything fails, an existing file of the same name stays unchanged.

    Args:
        model: An attached model, trained. It is not changed, with one exception: in a custom training loop the last
            steps may have moved weights out of their ranges; these ranges are fitted again, with a warning.
        folder: Folder of the file, which is called ``name`` with the suffix of the format.
        format: ``"packed"``: a safetensors file with each code at the width of its layer, for
            :func:`~cpq_lightning.load_quantized`; ``"onnx"``; ``"torch"``: a ``torch.export`` program.
        samples: A few dozen inputs: a tensor of the shape (samples, ...), a tuple of positional arguments, a dict of
            arguments by name (or the tuple or dict that the forward takes as its only argument), or
            :class:`~cpq_lightning.export.Samples`. Arguments may be tuples, lists, dicts and other containers that
            torch's pytree knows, with tensors in them. Numbers, strings and None become constants of an ONNX file or a
            program, and a warning names them. An ONNX file takes its tensors by the names of the arguments; a program
            is called with arguments in the same structure as the samples.
        name: Name of the file without its suffix.
        container: ONNX only: ``"int8"`` for speed, ``"int4"`` for size.
        architecture: ``{"timm": name, "arguments": {...}}`` where timm builds the network.
        verify: Whether to compare the file with the model.
        latency: ONNX only: whether to measure the latency of the file and of the full-precision network.

    Returns:
        The path and properties of the written file, and the results of verification and latency measurement.

    Raises:
        MismatchError: the file does not compute what the model computes.
        ExportError: the model cannot be exported, for example because layers were added after attach that its config
            would quantize, or because weights were rewritten after their ranges were fitted.
        ValueError: an argument is wrong.
        TypeError: the samples are no arguments of the forward, the samples contain a value that no file can take, or
            the model returns a value that no file can contain; the message names it.
        ImportError: the format needs packages that are not installed.
        OSError: the file cannot be written.

    Example:
        ``export_model(model, "out", format="onnx", samples=images, name="resnet18")``
    """
    check_formats([format])
    if container not in CONTAINERS:
        raise ValueError(f"container must be one of {CONTAINERS}, got {container!r}.")
    if not name or Path(name).name != name:
        raise ValueError(f"name must be a file's name without a folder, got {name!r}.")
    model = unwrapped(model)
    # This comes before levels are read: to read a sharded weight, one process alone would wait for the others.
    check_exportable(model)
    if names := uncalled(model):
        log.warning(
            "No forward has called the layers %s, only their weights are read: their inputs stay in full precision, as "
            "in training.",
            ", ".join(names),
        )
    bypassed_layers, _ = bypassed(model)
    if names := [name for name, layer in quantized_layers(model) if layer in bypassed_layers]:
        log.warning(
            "The forward multiplies by the weights of the layers %s in full precision, without calling these layers; "
            "the file does the same.",
            ", ".join(names),
        )
    for message in full_precision_messages(model):
        log.warning("%s", message)
    samples = Samples.of(samples, model)
    # A module that is not traced takes any arguments, so it has no constants.
    constants = samples.places(model)[1] if FORMATS[format].traces else {}
    if constants:
        log.warning(
            "Arguments that are no tensors are constants of the %s file: %s.",
            format,
            ", ".join(f"{name}={value!r}" for name, value in constants.items()),
        )
    path = Path(folder) / f"{name}{FORMATS[format].suffix}"
    totals = manifest(model)["totals"]
    model = evaluated(model)
    if verify or FORMATS[format].traces:
        _check_forward(model, samples)
    with replacing(path) as temporary:
        try:
            job = Job(model, temporary, samples, container, architecture)
            result = _write_and_verify(job, format, verify)
        except MismatchError as error:
            raise MismatchError(f"{path} was not written, it would not be the trained model. {error}") from None
        if result is not None and result.left_out:
            log.warning(
                "The forward does not use the layers %s with these samples in evaluation: the %s file leaves them out.",
                ", ".join(result.left_out),
                format,
            )
        measured = _time(model, temporary, samples) if latency and format == "onnx" else None
        read_types = FORMATS[format].code_types
        code_types = read_types(temporary) if read_types is not None else {}
    return Export(
        path,
        format,
        container if format == "onnx" else None,
        result,
        measured,
        totals["fp32_bytes"],
        path.stat().st_size,
        totals["weight_bits_avg"],
        totals["act_bits_avg"],
        tuple(map(str, full_precision_layers(model))),
        constants,
        code_types,
        tuple(name for name, layer in quantized_layers(model) if _has_balanced_grid(layer)),
    )


def _has_balanced_grid(layer: QuantizedLayer) -> bool:
    return bool((layer.weight_quantizer.codes_per_level() > 1).any())


def _write_and_verify(job: Job, format: Format, verified: bool) -> Verification | None:
    kind = FORMATS[format]
    kind.write(job)
    if not verified:
        return None
    try:
        return verify(job.model, kind.load(job), job.samples)
    except MismatchError as error:
        if kind.write_exact is None or job.container != "int8":
            raise
        # The fastest form rounds biases. A network that amplifies this error gets the exact form.
        log.warning("%s Written once more without integer biases, which is slower and exact.", error)
    kind.write_exact(job)
    return verify(job.model, kind.load(job), job.samples)


@torch.no_grad()
def _check_forward(model: nn.Module, samples: Samples) -> None:
    """Check the samples and the outputs in one forward: exporters and hooks would raise less helpful errors."""
    args, kwargs = samples.pair().call()
    try:
        output = evaluated(model)(*args, **kwargs)
    except Exception as error:
        names, constants = samples.places(model)
        arguments = [f"{n}: {tuple(t.shape[1:])}" for n, t in zip(names, samples.inputs, strict=True)]
        arguments += [f"{name}={value!r}" for name, value in constants.items()]
        raise ValueError(
            f"samples: the forward of {type(model).__name__} fails with them, which are {', '.join(arguments)} for "
            f"each sample ({type(error).__name__}: {error})."
        ) from error
    named_outputs(output)


def _time(model: nn.Module, path: Path, samples: Samples, budget: float = 3.0, max_runs: int = 100) -> Latency:
    """Measure at least 5 and at most ``max_runs`` pairs of runs, for ``budget`` seconds."""
    from cpq_lightning.export.onnx.runtime import seconds, session
    from cpq_lightning.export.onnx.write import full_precision

    sessions = [session(full_precision(detach(evaluated(model)), samples)), session(path.read_bytes())]
    names = [i.name for i in sessions[0].get_inputs()]
    inputs = {name: tensor.numpy() for name, tensor in zip(names, samples.first(1).inputs, strict=True)}
    pairs: list[list[float]] = []
    end = time.perf_counter() + budget
    while len(pairs) < 5 or (len(pairs) < max_runs and time.perf_counter() < end):
        pairs.append([seconds(s, inputs) for s in sessions])
    times = np.array(pairs)
    return Latency(*(float(np.median(v)) for v in (times[:, 0], times[:, 1], times[:, 0] / times[:, 1])))
