"""The packed format: one safetensors file with each weight's codes at its own width, and a header that vouches for it.

Tensors, for each quantized layer ``L``: ``L.weight_codes`` (bytes, see
:func:`~cpq_lightning.functional.pack_codes`; rows are the output channels), ``L.weight_step`` and, where its input is
quantized, ``L.input_step`` (float32); ``O.input_step`` for each operand ``O`` of a product without a weight that is
quantized (version 2; files without any are of version 1); and all else of the network's ``state_dict`` under its own
name. The file's metadata has one entry, :data:`KEY`: the SHA-256 of a JSON text, a newline, and that text, which lists
the layers, the architecture, the levels, and type, shape and SHA-256 of each tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from cpq_lightning.attach import modules_with_products, operand_names, operand_path, quantized_layers
from cpq_lightning.export.coded import CodedLayer, InputGrid, canonical_names, coded, coded_layers
from cpq_lightning.export.levels import compact_manifest
from cpq_lightning.functional import pack_codes, unpack_codes
from cpq_lightning.version import __version__

FORMAT = "cpq-lightning-packed"
VERSION = 2
KEY = "cpq_lightning"


@dataclass(frozen=True)
class PackedFile:
    """The content of a packed file, checked.

    Attributes:
        header: The JSON text's content.
        tensors: All tensors by name, codes still packed.
    """

    header: dict[str, Any]
    tensors: dict[str, Tensor]

    def codes(self, layer: Mapping[str, Any]) -> Tensor:
        """Levels of one entry of ``header["layers"]``, int8, in the weight's shape."""
        entry = layer["weight"]
        shape, dim = list(entry["shape"]), entry["channel_dim"]
        rows = [shape[dim], *(size for i, size in enumerate(shape) if i != dim)]
        return unpack_codes(self.tensors[entry["codes"]], entry["bits"], rows).movedim(0, dim).contiguous()


def write_packed(model: nn.Module, path: str | Path, *, architecture: Mapping[str, Any] | None = None) -> Path:
    """Write an attached model as a packed file; :func:`~cpq_lightning.export_model` does so as a whole or not at all.

    Args:
        model: An attached model, trained.
        path: The file; ``.safetensors`` is usual.
        architecture: ``{"timm": name, "arguments": {...}}`` where ``timm.create_model(name, **arguments)`` builds the
            network; without it a reader has to bring the network.

    Returns:
        The path.

    Raises:
        ValueError: the model cannot be exported; see :func:`~cpq_lightning.export.coded.evaluated`.
        OSError: the file cannot be written.
    """
    header, tensors = _content(model, architecture)
    text = json.dumps(header, separators=(",", ":"))
    signed = f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}"
    safetensors.torch.save_file(tensors, path, metadata={KEY: signed})
    return Path(path)


def _content(model: nn.Module, architecture: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    network = coded(model)
    # A weight that layers share is stored once.
    owners: dict[int, str] = {}
    sources = {name: owners.setdefault(layer.weight_id, name) for name, layer in quantized_layers(model)}
    widths = {name: layer.weight_quantizer.decided_widths().tolist() for name, layer in quantized_layers(model)}
    own: set[str] = set()
    tensors: dict[str, Tensor] = {}
    layers = []
    for name, layer in coded_layers(network):
        own |= {f"{name}.weight_codes", f"{name}.weight_step", f"{name}.input_grid.step"}
        source = sources[name]
        bits = widths[name][0] if len(widths[name]) == 1 else widths[name]
        entry = _weight_entry(layer, source, bits)
        if source == name:
            tensors[entry["codes"]] = pack_codes(layer.weight_codes.movedim(layer.channel_dim, 0).contiguous(), bits)
            tensors[entry["step"]] = layer.weight_step
        layers.append({"name": name, "weight": entry, "input": _input_entry(name, layer.input_grid, tensors)})
    products = []
    for name, module in modules_with_products(network):
        operands = {}
        for operand in operand_names(module.product_plan):
            path, grid = operand_path(name, operand), module.product_operands[operand]._modules.get("input_grid")
            own.add(f"{path}.input_grid.step")
            operands[operand] = _input_entry(path, grid, tensors)
        plan, counts = list(module.product_plan), sorted(module.product_counts)
        products.append({"module": name, "plan": plan, "counts": counts, "operands": operands})
    own |= canonical_names(network).keys()
    rest = {name: value for name, value in network.state_dict().items() if name not in own}
    tensors |= {name: value.contiguous().clone() for name, value in rest.items()}
    header = {
        "format": FORMAT,
        "version": VERSION if products else 1,
        "written_by": f"cpq-lightning {__version__}",
        "architecture": None if architecture is None else dict(architecture),
        "layers": layers,
        **({"products": products} if products else {}),
        "rest": list(rest),
        "levels": compact_manifest(model),
        "tensors": {name: _vouch(value) for name, value in tensors.items()},
    }
    return header, tensors


def _weight_entry(layer: CodedLayer, source: str, bits: int | list[int]) -> dict[str, Any]:
    return {
        "bits": bits,
        "shape": list(layer.weight_codes.shape),
        "channel_dim": layer.channel_dim,
        "codes": f"{source}.weight_codes",
        "step": f"{source}.weight_step",
    }


def _input_entry(name: str, grid: nn.Module | None, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    """How an input is quantized; its step goes to the ``tensors``."""
    if not isinstance(grid, InputGrid):
        return None
    tensors[f"{name}.input_step"] = grid.step
    bits = (grid.high - grid.low + 1).bit_length() - 1
    return {"bits": bits, "signed": grid.low < 0, "step": f"{name}.input_step"}


def _vouch(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "sha256": digest(tensor)}


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes in memory."""
    return hashlib.sha256(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
