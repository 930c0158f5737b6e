"""The file of samples in a run's folder: a safetensors file with one tensor per argument and a header with checksums.

Version 1 is for calls with positional tensors only. Version 2 also stores the structure of the call as ``form``: the
containers as torch's pytree serializes them, and their leaves in order, ``null`` for a tensor and ``[constant]`` for
anything else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from cpq_lightning.errors import UnreadableFileError
from cpq_lightning.export.calls import TENSOR, Form, dump_spec, load_spec
from cpq_lightning.export.samples import Samples
from cpq_lightning.files import write_atomically
from cpq_lightning.packing.layout import KEY, digest

SAMPLES_FILE = "samples.safetensors"
_FORMAT, _VERSION = "cpq-lightning-samples", 2


def write_samples(samples: Samples, path: str | Path) -> Path:
    """Write samples to a file atomically.

    Args:
        samples: Inputs of a model.
        path: The file to write; ``cpq export`` looks for :data:`SAMPLES_FILE` in a run's folder.

    Returns:
        The path.

    Raises:
        OSError: the file cannot be written.
        TypeError: the class of an argument is registered with torch's pytree without a serialized name.

    Example:
        ``write_samples(Samples.of(images), "samples.safetensors")``
    """
    # The copies are needed because safetensors rejects tensors that share memory.
    tensors = {
        f"input.{i}": t.detach().clone(memory_format=torch.contiguous_format) for i, t in enumerate(samples.inputs)
    }
    positional = samples.form == Samples(samples.inputs).form
    header = {
        "format": _FORMAT,
        "version": 1 if positional else _VERSION,
        **({} if positional else {"form": _form_to_json(samples.form)}),
        "real": samples.real,
        "sha256": {name: digest(tensor) for name, tensor in tensors.items()},
    }
    write_atomically(Path(path), safetensors.torch.save(tensors, metadata={KEY: json.dumps(header)}))
    return Path(path)


def read_samples(path: str | Path) -> Samples:
    """Read a file of :func:`write_samples`.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableFileError: the file is no file of samples, is of a newer version, or is truncated or damaged; the
            message gives the reason.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"samples={path} is no file: expected a file of samples, such as {SAMPLES_FILE} in a run's folder."
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except SafetensorError as error:
        raise _refused(path, f"safetensors cannot read it ({error})") from None
    try:
        header = json.loads(metadata[KEY])
        known, version, real, digests = (header[key] for key in ("format", "version", "real", "sha256"))
    except (KeyError, TypeError, ValueError):
        raise _refused(path, "its header is not that of samples") from None
    if known != _FORMAT:
        raise _refused(path, "its header is not that of samples")
    if version not in (1, _VERSION):
        raise UnreadableFileError(
            f"samples={path} is of version {version} of the file of samples; this cpq-lightning reads up to "
            f"{_VERSION}: install the version that wrote the file, or a newer one."
        )
    names = [f"input.{i}" for i in range(len(tensors))]
    if not tensors or set(tensors) != set(names) or digests != {name: digest(tensors[name]) for name in names}:
        raise _refused(path, "its tensors do not match the checksums in its header")
    try:
        form = None if version == 1 else _form_from_json(header.get("form"))
        return Samples(tuple(tensors[name] for name in names), bool(real), form)
    except ValueError as error:
        raise _refused(path, str(error).rstrip(".")) from None


def _form_to_json(form: Form | None) -> dict[str, Any]:
    assert form is not None
    return {"spec": dump_spec(form), "leaves": [None if leaf is TENSOR else [leaf] for leaf in form.leaves]}


def _form_from_json(content: Any) -> Form:
    try:
        spec, leaves = load_spec(content["spec"]), [TENSOR if leaf is None else leaf[0] for leaf in content["leaves"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"its header has no valid call ({error})") from None
    if spec.num_leaves != len(leaves):
        raise ValueError(f"its call has {spec.num_leaves} leaves, but {len(leaves)} values")
    return Form(spec, tuple(leaves))


def _refused(path: str | Path, reason: str) -> UnreadableFileError:
    return UnreadableFileError(
        f"samples={path} is no file of samples, or is damaged: {reason}. Expected the complete {SAMPLES_FILE} of a "
        "run's folder, or a file of cpq_lightning.export.write_samples."
    )
