"""From a trained model to a file that has been proved to be that model."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cpq_lightning.attach.attach import detach
from cpq_lightning.attach.layers import bypassed, quantized_layers
from cpq_lightning.attach.origin import full_precision_layers
from cpq_lightning.attach.wrapping import unwrapped
from cpq_lightning.export.calls import Constant, named_outputs
from cpq_lightning.export.formats import CONTAINERS, SUFFIXES, Container, Format, check_formats
from cpq_lightning.export.integer_model import check_exportable, evaluated, uncalled
from cpq_lightning.export.packed import write_packed
from cpq_lightning.export.program import write_program
from cpq_lightning.export.runtimes import PackedArtefact, ProgramArtefact
from cpq_lightning.export.samples import Samples
from cpq_lightning.export.verify import Artefact, MismatchError, Verification, verify
from cpq_lightning.files import replacing
from cpq_lightning.report.levels import full_precision_messages, manifest

log = logging.getLogger("cpq_lightning")


@dataclass(frozen=True)
class Latency:
    """One sample on this machine's CPU, both in turn in one run.

    Attributes:
        full_precision: Median, in seconds.
        quantized: Median, in seconds.
        speedup: Median of the ratios within a pair of runs.
    """

    full_precision: float
    quantized: float
    speedup: float


@dataclass(frozen=True)
class Export:
    """A file that has been written.

    Attributes:
        path: The file.
        format: ``"packed"``, ``"onnx"`` or ``"torch"``.
        container: Of ONNX, what holds the codes.
        verification: What was compared; ``None`` where that was switched off.
        latency: Of ONNX, where it was asked for.
        float_bytes: The model in float32.
        file_bytes: The file.
        weight_bits: Average bits over quantized weights, first and last layer left out; ``None`` of nothing.
        act_bits: The same of activations.
        full_precision: Layers with a weight that nothing quantizes, such as recurrent ones.
        constants: Arguments by name that are part of the file as the samples have them, because they are no tensors.
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


def export_model(
    model: nn.Module,
    folder: str | Path,
    *,
    format: Format = "packed",
    samples: Any,
    name: str = "model",
    container: Container = "int8",
    architecture: Mapping[str, Any] | None = None,
    verification: bool = True,
    latency: bool = False,
) -> Export:
    """Write an attached model as one file, and prove that it is the same model.

    The file takes its place in the folder once it has been loaded in its own runtime and compared with the model; see
    :func:`~cpq_lightning.export.verify.verify`. Until then, and where anything fails, what was there stays.

    Args:
        model: An attached model, trained. It is not changed; but ranges of weights that the last steps of a loop of
            your own have outgrown are fitted anew, which a warning says.
        folder: Where the file goes, as ``name`` and the format's ending.
        format: ``"packed"``: codes at their own widths in safetensors, for
            :func:`~cpq_lightning.load_quantized`; ``"onnx"``; ``"torch"``: a ``torch.export`` program.
        samples: Inputs, a few dozen: a tensor of the shape (samples, ...), a tuple of positional arguments, a dict of
            arguments by name (or the tuple or dict that the forward takes as its one argument), or
            :class:`~cpq_lightning.export.Samples`. Arguments may be tuples, lists, dicts and whatever else torch's
            pytree knows, with tensors in them. Numbers, strings and None are constants of an ONNX file or a program,
            which a warning names; an ONNX file takes its tensors by the names of the arguments, a program is called as
            the samples are given.
        name: The file's name without its ending.
        container: Of ONNX: ``"int8"`` for speed, ``"int4"`` for size.
        architecture: ``{"timm": name, "arguments": {...}}`` where timm builds the network.
        verification: Whether to compare.
        latency: Of ONNX: whether to time it against full precision.

    Returns:
        What was written.

    Raises:
        MismatchError: the file does not compute what the model computes.
        ValueError: the model cannot be exported, as where layers have come behind attach that its config would
            quantize, or where weights were rewritten behind their ranges; or an argument is wrong.
        TypeError: the samples are no arguments of the forward, have something in them that no file can take, or the
            model returns something that no file can hold; it says which.
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
    # Before levels are read: of a weight that is spread over processes, one of them alone would wait for the others.
    check_exportable(model)
    if names := uncalled(model):
        log.warning(
            "No forward has called the layers %s, of which only the weight is read: their inputs stay in full "
            "precision, as in training.",
            ", ".join(names),
        )
    around, _ = bypassed(model)
    if names := [name for name, layer in quantized_layers(model) if layer in around]:
        log.warning(
            "The forward multiplies by the weights of the layers %s in full precision, without calling them: so does "
            "the file.",
            ", ".join(names),
        )
    for message in full_precision_messages(model):
        log.warning("%s", message)
    samples = Samples.of(samples, model)
    # A packed file is a module that takes any arguments.
    constants = {} if format == "packed" else samples.places(model)[1]
    if constants:
        log.warning(
            "Arguments that are no tensors are constants of the %s file: %s.",
            format,
            ", ".join(f"{name}={value!r}" for name, value in constants.items()),
        )
    path = Path(folder) / f"{name}{SUFFIXES[format]}"
    totals = manifest(model)["totals"]
    model = evaluated(model)
    with replacing(path) as temporary:
        try:
            proof = _write_and_verify(model, temporary, format, samples, container, architecture, verification)
        except MismatchError as error:
            raise MismatchError(f"{path} was not written, it would not be the trained model. {error}") from None
        timed = _time(model, temporary, samples) if latency and format == "onnx" else None
    return Export(
        path,
        format,
        container if format == "onnx" else None,
        proof,
        timed,
        totals["fp32_bytes"],
        path.stat().st_size,
        totals["weight_bits_avg"],
        totals["act_bits_avg"],
        tuple(map(str, full_precision_layers(model))),
        constants,
    )


def _write_and_verify(
    model: nn.Module,
    path: Path,
    format: Format,
    samples: Samples,
    container: Container,
    architecture: Mapping[str, Any] | None,
    verification: bool,
) -> Verification | None:
    if verification or format != "packed":
        _check_forward(model, samples)
    if format == "packed":
        write_packed(model, path, architecture=architecture)
    elif format == "torch":
        write_program(model, path, samples)
    else:
        from cpq_lightning.export.onnx.write import write_onnx

        write_onnx(model, path, samples, container=container, architecture=architecture)
        try:
            return verify(model, load_artefact(model, path, format), samples) if verification else None
        except MismatchError as error:
            if container != "int8":
                raise
            # The fastest form rounds biases. A network that multiplies what that moves gets the exact form.
            log.warning("%s Written once more without integer biases, which is slower and exact.", error)
        write_onnx(model, path, samples, container=container, architecture=architecture, round_biases=False)
    return verify(model, load_artefact(model, path, format, architecture), samples) if verification else None


@torch.no_grad()
def _check_forward(model: nn.Module, samples: Samples) -> None:
    """Exporters, and hooks around layers, tell less of samples that do not fit and of outputs that no file can hold."""
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


def load_artefact(
    model: nn.Module, path: Path, format: Format, architecture: Mapping[str, Any] | None = None
) -> Artefact:
    """A file of :func:`export_model`, in its own runtime."""
    if format == "packed":
        return PackedArtefact(path, None if architecture is not None else detach(evaluated(model)))
    if format == "torch":
        return ProgramArtefact(path)
    from cpq_lightning.export.onnx.runtime import OnnxArtefact

    return OnnxArtefact(path)


def _time(model: nn.Module, path: Path, samples: Samples, budget: float = 3.0, most: int = 100) -> Latency:
    from cpq_lightning.export.onnx.runtime import seconds, session
    from cpq_lightning.export.onnx.write import full_precision

    sessions = [session(full_precision(detach(evaluated(model)), samples)), session(path.read_bytes())]
    names = [i.name for i in sessions[0].get_inputs()]
    fed = {name: tensor.numpy() for name, tensor in zip(names, samples.first(1).inputs, strict=True)}
    taken: list[list[float]] = []
    end = time.perf_counter() + budget
    while len(taken) < 5 or (len(taken) < most and time.perf_counter() < end):
        taken.append([seconds(one, fed) for one in sessions])
    times = np.array(taken)
    return Latency(*(float(np.median(v)) for v in (times[:, 0], times[:, 1], times[:, 0] / times[:, 1])))
