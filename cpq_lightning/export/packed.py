"""Writing the packed format: one safetensors file with the codes of each weight at the width of its layer, and a header
with checksums (:mod:`cpq_lightning.packing.layout`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from cpq_lightning.attach.products import modules_with_products, operand_names
from cpq_lightning.export.integer_model import InputGrid, integer_layers, integer_tables, to_integer_model
from cpq_lightning.functional.packing import pack_codes, unpack_codes
from cpq_lightning.packing.layout import (
    CODES,
    KEY,
    Rest,
    canonical_names,
    complete,
    describe,
    digest_of_all,
    dtype_name,
    signed,
)


@dataclass(frozen=True)
class PackedFile:
    """The checked content of a packed file of any version.

    Attributes:
        header: The description of the model: ``architecture``; ``layers``, each with ``name``, ``weight`` (bits, shape,
            channel_dim, group_size, the balanced widths, and the names of the tensors of codes and scales) and
            ``input`` (bits, zero point, and the name of the tensor of the scale); ``products``; ``tied``; and ``rest``,
            the names of tensors that are not quantized.
        tensors: All tensors by name; codes are still packed.
    """

    header: dict[str, Any]
    tensors: dict[str, Tensor]

    def codes(self, layer: Mapping[str, Any]) -> Tensor:
        """Unpack the codes of one entry of ``header["layers"]``: int8, in the shape of the weight."""
        entry = layer["weight"]
        shape, dim = list(entry["shape"]), entry["channel_dim"]
        rows = [shape[dim], *(size for i, size in enumerate(shape) if i != dim)]
        codes = unpack_codes(self.tensors[entry["codes"]], entry["bits"], rows)
        odd = _balanced_rows(entry["bits"], entry["balanced"], codes)
        return torch.where(odd, 2 * codes + 1, codes).movedim(0, dim).contiguous()


def _balanced_rows(bits: int | Sequence[int], balanced: Collection[int], codes: Tensor) -> Tensor:
    """Whether the grid of each row is balanced, broadcastable to ``codes``."""
    widths = [bits] if isinstance(bits, int) else bits
    return torch.tensor([k in balanced for k in widths]).reshape(-1, *[1] * (codes.dim() - 1))


def write_packed(model: nn.Module, path: str | Path, *, architecture: Mapping[str, Any] | None = None) -> Path:
    """Write an attached model as a packed file. :func:`~cpq_lightning.export_model` does the same atomically.

    Args:
        model: An attached model, trained.
        path: The file to write; the usual suffix is ``.safetensors``.
        architecture: ``{"timm": name, "arguments": {...}}`` where ``timm.create_model(name, **arguments)`` builds the
            network; without it, a reader of the file must provide the network.

    Returns:
        The path.

    Raises:
        ValueError: the model cannot be exported; see :func:`~cpq_lightning.export.integer_model.evaluated`.
        OSError: the file cannot be written.
    """
    network = to_integer_model(model)
    described = describe(model)
    codes, floats, quantized_names = _quantized(network, described)
    state = {name: value for name, value in network.state_dict().items() if name not in quantized_names}
    rest: Rest = {}
    flat = {CODES: codes, "float32": floats}
    for name, value in state.items():
        dtype = dtype_name(value)
        rest.setdefault(dtype, {})[name] = list(value.shape)
        flat.setdefault(dtype, []).append(value.reshape(-1))
    tensors = {name: torch.cat(parts) for name, parts in flat.items() if parts}
    header = complete(described, rest, architecture, digest_of_all(tensors))
    safetensors.torch.save_file(tensors, path, metadata={KEY: signed(header)})
    return Path(path)


def _quantized(network: nn.Module, described: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor], set[str]]:
    """Packed codes and scales of an integer model in the order of its header, and the state_dict entries not to write.

    These entries are the codes and scales themselves, and further names of modules that are registered several times.
    """
    layers = dict(integer_layers(network))
    names = {*canonical_names(network)}
    codes: list[Tensor] = []
    steps: list[Tensor] = []
    for entry in described["layers"]:
        name, layer = entry["name"], layers[entry["name"]]
        names |= {f"{name}.weight_codes", f"{name}.weight_step", f"{name}.input_grid.step"}
        if "source" not in entry:
            rows = layer.weight_codes.movedim(layer.channel_dim, 0).contiguous()
            # Codes of balanced grids are odd.
            odd = _balanced_rows(entry["bits"], entry.get("balanced", ()), rows)
            codes.append(pack_codes(torch.where(odd, (rows - 1) // 2, rows), entry["bits"]))
            steps.append(layer.weight_step.reshape(-1))
        if layer.input_grid is not None:
            steps.append(layer.input_grid.step)
    for name, module in modules_with_products(network):
        # A module that is left out has no operands.
        for key in operand_names(module.product_plan):
            operand = module.product_operands[key]
            names.add(f"{name}.product_operands.{key}.input_grid.step".lstrip("."))
            grid = operand._modules.get("input_grid")
            if isinstance(grid, InputGrid):
                steps.append(grid.step)
    for name, _ in integer_tables(network):
        names |= {f"{name}.weight_codes".lstrip("."), f"{name}.weight_step".lstrip(".")}
    return codes, steps, names
