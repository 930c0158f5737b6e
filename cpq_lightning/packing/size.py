"""How large the packed file of a model is, to the byte, before there is one; and what widths cost in it."""

from __future__ import annotations

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

# Bytes by which a weight's codes and the header of the file are rounded up.
_ROUNDING = 16.0


def packed_size(model: nn.Module, architecture: Mapping[str, Any] | None = None) -> int:
    """Bytes of the packed file of an attached model, as it is now: codes, steps, the rest in float32, and the header.

    Args:
        model: What is exported, attached.
        architecture: As :func:`~cpq_lightning.export.packed.write_packed` takes it.
    """
    header = _header(unwrapped(model), architecture)
    return _file_bytes(_written(signed(header)), lengths(header))


def byte_cost(
    model: nn.Module, learners: Sequence[Quantizer], architecture: Mapping[str, Any] | None = None
) -> WidthCost:
    """What the widths of some quantizers cost in bytes of the packed file, all others as they are.

    Args:
        model: What is exported, attached.
        learners: The quantizers whose widths vary; rows are their widths, one each or one a channel, in order. Those of
            activations, and of what is not exported, cost nothing.
        architecture: As :func:`packed_size` takes it.
    """
    model = unwrapped(model)
    first: dict[Quantizer, int] = {}
    rows = 0
    for quantizer in learners:
        first[quantizer] = rows
        rows += quantizer.gates.rows
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
    # As wide as they can be, but channels not all of one width: on the way each has its own.
    widest = [torch.full((q.gates.rows,), float(q.bits), dtype=torch.float64) for q in learners]
    for own in widest:
        own[1:2] -= 1
    most = torch.cat(widest) if widest else torch.zeros(0, dtype=torch.float64)
    constant = exact(most) - float((coefficients * most[index]).sum())
    return WidthCost(coefficients, index, torch.full_like(index, rows), constant, exact, _ROUNDING)


@dataclass(frozen=True)
class _Varied:
    """A layer's entry in a header, the quantizer of its weight, and the first of its widths' rows."""

    entry: Mapping[str, Any]
    quantizer: Quantizer
    row: int

    def parts(self, widths: Mapping[str, Any]) -> tuple[int, int, int]:
        """Characters, bytes of codes, and steps that some widths take."""
        # JSON within a JSON text.
        characters = _written(json.dumps(widths, separators=(",", ":")))
        return characters, code_bytes({"bits": widths["bits"], "shape": self.entry["shape"]}), widths.get("steps", 1)


class _FileSize:
    """The size of a file by the widths of some of its weights.

    Args:
        header: Of the file.
        varied: The layers whose widths vary.
    """

    def __init__(self, header: Mapping[str, Any], varied: Sequence[_Varied]) -> None:
        self._varied = varied
        self._elements = lengths(header)
        self._characters = _written(signed(header))
        for one in varied:
            now = {key: one.entry[key] for key in ("bits", "steps") if key in one.entry}
            characters, codes, steps = one.parts(now)
            self._characters -= characters
            self._elements[CODES] -= codes
            self._elements["float32"] -= steps

    def __call__(self, widths: Tensor) -> float:
        """Bytes at whole widths, shape (rows,), float64."""
        total, elements = self._characters, dict(self._elements)
        for one in self._varied:
            chosen = widths[one.row : one.row + one.quantizer.gates.rows].long().tolist()
            # Channels that all have one width are a weight of one.
            chosen = chosen[:1] if min(chosen) == max(chosen) else chosen
            characters, codes, steps = one.parts(width_entry(one.quantizer, chosen))
            total += characters
            elements[CODES] += codes
            elements["float32"] += steps
        return float(_file_bytes(total, elements))


def _header(model: nn.Module, architecture: Mapping[str, Any] | None) -> dict[str, Any]:
    described = describe(model)
    return complete(described, rest_of(model, described.get("tied", {})), architecture)


def _written(value: Any) -> int:
    """Characters of a value in JSON."""
    return len(json.dumps(value, separators=(",", ":")))


def _file_bytes(entry: int, elements: Mapping[str, int]) -> int:
    """Size of a safetensors file of flat tensors, whose metadata has one entry of so many characters."""
    listed: dict[str, Any] = {}
    end, order = 0, list(DTYPES)
    types = {name: "uint8" if name == CODES else name for name in elements}
    for name in sorted(elements, key=lambda name: (order.index(types[name]), name)):
        code, size = DTYPES[types[name]]
        begin, end = end, end + size * elements[name]
        listed[name] = {"dtype": code, "shape": [elements[name]], "data_offsets": [begin, end]}
    header = _written({"__metadata__": {KEY: ""}, **listed}) - len('""') + entry
    # Its length in eight bytes, and spaces up to a multiple of eight.
    return 8 + -(-header // 8) * 8 + end
