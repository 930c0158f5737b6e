"""The exact size of the packed file of a model before it is written, and the cost of bit widths in its bytes."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cpq_lightning.attach.layers import quantized_layers
from cpq_lightning.attach.wrapping import unwrapped
from cpq_lightning.bitwidth.cost import WidthCost
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.packing.layout import (
    CODES,
    DTYPES,
    KEY,
    code_bytes,
    complete,
    describe,
    lengths,
    rest_of,
    signed,
    width_entry,
)

# Maximum number of bytes by which the codes of a weight and the header of the file are rounded up.
_ROUNDING = 16.0


def packed_size(model: nn.Module, architecture: Mapping[str, Any] | None = None) -> int:
    """Bytes of the packed file of an attached model at its present widths: codes, scales, unquantized tensors, header.

    Args:
        model: The attached model to export.
        architecture: As for :func:`~cpq_lightning.export.packed.write_packed`.
    """
    header = _header(unwrapped(model), architecture)
    return _file_bytes(_json_length(signed(header)), lengths(header))


def byte_cost(
    model: nn.Module, learners: Sequence[Quantizer], architecture: Mapping[str, Any] | None = None
) -> WidthCost:
    """The cost of the widths of some quantizers in bytes of the packed file; all other widths are constants.

    Args:
        model: The attached model to export.
        learners: The quantizers whose widths vary; a row is the width of a quantizer or of one of its channels, in
            order. Quantizers of activations, and of layers that are not exported, cost nothing.
        architecture: As for :func:`packed_size`.
    """
    model = unwrapped(model)
    *starts, rows = itertools.accumulate((q.gates.rows for q in learners), initial=0)
    first = dict(zip(learners, starts, strict=True))
    header, layers = _header(model, architecture), dict(quantized_layers(model))
    varied: list[_Varied] = []
    for entry in header["layers"]:
        quantizer = layers[entry["name"]].weight_quantizer
        if "source" not in entry and quantizer in first:
            varied.append(_Varied(entry, quantizer, first[quantizer]))
    index = torch.tensor([v.row + i for v in varied for i in range(v.quantizer.gates.rows)], dtype=torch.int64)
    each = [
        math.prod(v.entry["shape"]) / 8 / v.quantizer.gates.rows for v in varied for _ in range(v.quantizer.gates.rows)
    ]
    coefficients = torch.tensor(each, dtype=torch.float64)
    exact = _FileSize(header, varied)
    # The constant is taken at the widest widths, with one channel narrower: then each channel's width is listed.
    widest = [torch.full((q.gates.rows,), float(q.bits), dtype=torch.float64) for q in learners]
    for widths in widest:
        widths[1:2] -= 1
    reference = torch.cat(widest) if widest else torch.zeros(0, dtype=torch.float64)
    constant = exact(reference) - float((coefficients * reference[index]).sum())
    return WidthCost(coefficients, index, torch.full_like(index, rows), constant, exact, _ROUNDING)


@dataclass(frozen=True)
class _Varied:
    """A layer's entry in a header, the quantizer of its weight, and the first row of its widths."""

    entry: Mapping[str, Any]
    quantizer: Quantizer
    row: int

    def parts(self, widths: Mapping[str, Any]) -> tuple[int, int, int]:
        """The characters in the header, bytes of codes, and number of scales for an entry of widths."""
        # The header is JSON within a JSON string.
        characters = _json_length(json.dumps(widths, separators=(",", ":")))
        return characters, code_bytes({"bits": widths["bits"], "shape": self.entry["shape"]}), widths.get("steps", 1)


class _FileSize:
    """The size of a file as a function of the widths of some of its weights.

    Args:
        header: The header of the file.
        varied: The layers whose widths vary.
    """

    def __init__(self, header: Mapping[str, Any], varied: Sequence[_Varied]) -> None:
        self._varied = varied
        self._elements = lengths(header)
        self._characters = _json_length(signed(header))
        for layer in varied:
            present = {key: layer.entry[key] for key in ("bits", "steps", "balanced") if key in layer.entry}
            characters, codes, steps = layer.parts(present)
            self._characters -= characters
            self._elements[CODES] -= codes
            self._elements["float32"] -= steps

    def __call__(self, widths: Tensor) -> float:
        """Bytes at integer widths, shape (rows,), float64."""
        total, elements = self._characters, dict(self._elements)
        for layer in self._varied:
            chosen = widths[layer.row : layer.row + layer.quantizer.gates.rows].long().tolist()
            # Equal widths of all channels are stored as one width.
            chosen = chosen[:1] if min(chosen) == max(chosen) else chosen
            characters, codes, steps = layer.parts(width_entry(layer.quantizer, chosen))
            total += characters
            elements[CODES] += codes
            elements["float32"] += steps
        return float(_file_bytes(total, elements))


def _header(model: nn.Module, architecture: Mapping[str, Any] | None) -> dict[str, Any]:
    described = describe(model)
    return complete(described, rest_of(model, described.get("tied", {})), architecture)


def _json_length(value: Any) -> int:
    """Number of characters of a value in JSON."""
    return len(json.dumps(value, separators=(",", ":")))


def _file_bytes(entry_length: int, elements: Mapping[str, int]) -> int:
    """Size of a safetensors file of flat tensors, with one metadata entry of ``entry_length`` characters."""
    listed: dict[str, Any] = {}
    end, order = 0, list(DTYPES)
    types = {name: "uint8" if name == CODES else name for name in elements}
    for name in sorted(elements, key=lambda name: (order.index(types[name]), name)):
        code, size = DTYPES[types[name]]
        begin, end = end, end + size * elements[name]
        listed[name] = {"dtype": code, "shape": [elements[name]], "data_offsets": [begin, end]}
    header = _json_length({"__metadata__": {KEY: ""}, **listed}) - len('""') + entry_length
    # The file starts with the header length in eight bytes, and the header is padded to a multiple of eight.
    return 8 + -(-header // 8) * 8 + end
