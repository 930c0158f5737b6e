"""Samples of a run in a file of its folder: safetensors, a tensor an argument, and a header that vouches for them.

Version 2 has the call that they are parts of, ``form``: the containers as torch's pytree writes them, and what is in
them in order, ``null`` for a tensor and ``[constant]`` for anything else. Positional tensors alone are of version 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from cpq_lightning.export.calls import TENSOR, Form, dump_spec, load_spec
from cpq_lightning.export.samples import Samples
from cpq_lightning.files import write_atomically
from cpq_lightning.packing.layout import KEY, digest

SAMPLES_FILE = "samples.safetensors"
_FORMAT, _VERSION = "cpq-lightning-samples", 2


def write_samples(samples: Samples, path: str | Path) -> Path:
    """Write samples, whole or not at all.

    Args:
        samples: Inputs of a model.
        path: The file; :data:`SAMPLES_FILE` in a run's folder is where ``cpq export`` looks.

    Returns:
        The path.

    Raises:
        OSError: the file cannot be written.
        TypeError: arguments come in a class that torch's pytree knows no name of.

    Example:
        ``write_samples(Samples.of(images), "samples.safetensors")``
    """
    # Copies: safetensors refuses tensors that share memory.
    tensors = {
        f"input.{i}": t.detach().clone(memory_format=torch.contiguous_format) for i, t in enumerate(samples.inputs)
    }
    positional = samples.form == Samples(samples.inputs).form
    header = {
        "format": _FORMAT,
        "version": 1 if positional else _VERSION,
        **({} if positional else {"form": _written(samples.form)}),
        "real": samples.real,
        "sha256": {name: digest(tensor) for name, tensor in tensors.items()},
    }
    write_atomically(Path(path), safetensors.torch.save(tensors, metadata={KEY: json.dumps(header)}))
    return Path(path)


def read_samples(path: str | Path) -> Samples:
    """The samples of a file of :func:`write_samples`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of ours, of a newer version, truncated or damaged; with what is wrong.
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
        raise ValueError(
            f"samples={path} is of version {version} of the file of samples; this cpq-lightning reads up to "
            f"{_VERSION}: install the one that wrote it, or a newer one."
        )
    names = [f"input.{i}" for i in range(len(tensors))]
    if not tensors or set(tensors) != set(names) or digests != {name: digest(tensors[name]) for name in names}:
        raise _refused(path, "its tensors are not those that its header vouches for")
    try:
        form = None if version == 1 else _read(header.get("form"))
        return Samples(tuple(tensors[name] for name in names), bool(real), form)
    except ValueError as error:
        raise _refused(path, str(error).rstrip(".")) from None


def _written(form: Form | None) -> dict[str, Any]:
    assert form is not None
    return {"spec": dump_spec(form), "leaves": [None if leaf is TENSOR else [leaf] for leaf in form.leaves]}


def _read(content: Any) -> Form:
    try:
        spec, leaves = load_spec(content["spec"]), [TENSOR if leaf is None else leaf[0] for leaf in content["leaves"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"its header has no call of them ({error})") from None
    if spec.num_leaves != len(leaves):
        raise ValueError(f"its call has {spec.num_leaves} places for {len(leaves)} arguments")
    return Form(spec, tuple(leaves))


def _refused(path: str | Path, reason: str) -> ValueError:
    return ValueError(
        f"samples={path} is no file of samples, or is damaged: {reason}. Expected {SAMPLES_FILE} of a run's folder, "
        "whole, or a file of cpq_lightning.export.write_samples."
    )
