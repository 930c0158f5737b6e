"""Preparation of the graph for the file: integer types of the codes, names of tensors, and metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from cpq_lightning.export.formats import Container
from cpq_lightning.export.onnx.graph import Array, Editor, known, layer_of, nodes, stored_levels, tidy
from cpq_lightning.export.onnx.pairs import cut_off
from cpq_lightning.version import __version__

FORMAT, VERSION = "cpq-lightning-onnx", 1
# The entry of the model's metadata.
KEY = "cpq_lightning"
# The zero point of codes in unsigned bytes.
_MIDDLE = 128


def lowest_level(codes: Array, container: Container) -> int:
    """The lowest level of the integer type that the container uses for these codes."""
    return -8 if container == "int4" and _fits_in_four_bits(codes) else -128


def _fits_in_four_bits(codes: Array) -> bool:
    return bool(codes.min(initial=0) >= -8 and codes.max(initial=0) <= 7)


def use_four_bits(model: ir.Model) -> None:
    """Store the codes of each weight that fit into 4 bits in an INT4 tensor, two codes per byte."""
    edit = Editor(model.graph)
    for layer, dequantize in _weight_dequantizers(model.graph):
        codes = known(dequantize.inputs[0])
        if not _fits_in_four_bits(codes):
            continue
        zeros = np.zeros(known(dequantize.inputs[1]).shape, ml_dtypes.int4)
        dequantize.replace_input_with(0, edit.constant(f"{layer}.weight_codes", codes.astype(ml_dtypes.int4)))
        dequantize.replace_input_with(2, edit.constant(f"{layer}.weight_zero_point", zeros))
    tidy(model)


def share_codes(model: ir.Model) -> None:
    """Store equal codes of several layers, such as layers that share a weight, in one tensor."""
    first: dict[tuple[Any, ...], ir.Value] = {}
    for _, dequantize in _weight_dequantizers(model.graph):
        codes, value = known(dequantize.inputs[0]), dequantize.inputs[0]
        assert value is not None
        content = hashlib.sha256(codes.tobytes()).digest()
        dequantize.replace_input_with(0, first.setdefault((codes.dtype, codes.shape, content), value))
    tidy(model)


def use_unsigned_bytes(model: ir.Model) -> None:
    """Store codes as unsigned bytes, with a zero point of 128, where the sum of two products could saturate.

    Other codes stay signed bytes, because the kernels for these are faster on some processors. Codes that several
    layers share become unsigned if the products of at least one of these layers could saturate.
    """
    edit = Editor(model.graph)
    saturating = {product.weight.inputs[0] for product in cut_off(model.graph) if product.weight is not None}
    stored: dict[ir.Value, ir.Value] = {}
    for layer, dequantize in _weight_dequantizers(model.graph):
        value = dequantize.inputs[0]
        if value is None or value not in saturating:
            continue
        if value not in stored:
            codes = (known(value).astype(np.int16) + _MIDDLE).astype(np.uint8)
            stored[value] = edit.constant(f"{layer}.weight_codes", codes)
        middle = np.full(known(dequantize.inputs[1]).shape, _MIDDLE, np.uint8)
        dequantize.replace_input_with(0, stored[value])
        dequantize.replace_input_with(2, edit.constant(f"{layer}.weight_zero_point", middle))
    tidy(model)


def _weight_dequantizers(graph: ir.Graph) -> Iterator[tuple[str, ir.Node]]:
    """Each layer with the DequantizeLinear of its weight. The graph may change during the iteration."""
    for dequantize in nodes(graph, "DequantizeLinear"):
        layer = layer_of(dequantize, "weight")
        if layer is not None:
            yield layer, dequantize


def finish(model: ir.Model, content: Mapping[str, Any]) -> None:
    """Name the tensors of weights after their layers, remove information on the machine, and add the metadata."""
    graph = model.graph
    wanted: dict[str, ir.Value] = {}
    for node in graph:
        node.doc_string = None
        for key in [k for k in node.metadata_props if not k.startswith("cpq.")]:
            del node.metadata_props[key]
        layer = layer_of(node, "weight")
        if layer is not None and node.op_type == "DequantizeLinear":
            for value, part in zip(node.inputs, ("codes", "scale", "zero_point"), strict=False):
                # Codes that several layers share are named after the first of these layers.
                named = value in wanted.values() if part == "codes" else value is not None and len(value.uses()) > 1
                if value is not None and not named:
                    wanted[_free(f"{layer}.weight_{part}", wanted)] = value
    for value in [*graph.initializers.values(), *(o for n in graph for o in n.outputs)]:
        value.metadata_props.clear()
    _rename(graph, wanted)
    graph.metadata_props.clear()
    model.metadata_props.clear()
    model.metadata_props[KEY] = json.dumps(
        {"format": FORMAT, "version": VERSION, "written_by": f"cpq-lightning {__version__}", **content}
    )
    model.producer_name, model.producer_version = "cpq-lightning", __version__
    graph.name = "quantized"
    graph.doc_string = model.doc_string = None


def _free(name: str, taken: Mapping[str, Any]) -> str:
    number = 1
    candidate = name
    while candidate in taken:
        number += 1
        candidate = f"{name}.{number}"
    return candidate


def _rename(graph: ir.Graph, wanted: Mapping[str, ir.Value]) -> None:
    for value in wanted.values():
        graph.initializers.pop(str(value.name))
    for name, value in wanted.items():
        if name in graph.initializers:
            # Another tensor already has this name.
            other = graph.initializers.pop(name)
            other.name = _free(f"{name}.other", graph.initializers)
            graph.register_initializer(other)
        value.name = name
        if value.const_value is not None:
            value.const_value.name = name
        graph.register_initializer(value)


def stored_codes(graph: ir.Graph) -> dict[str, tuple[Array, ir.Node]]:
    """The codes of each layer's weight minus their zero point, and the first DequantizeLinear that reads them."""
    by_layer: dict[str, tuple[Array, ir.Node]] = {}
    for layer, dequantize in _weight_dequantizers(graph):
        if layer not in by_layer:
            by_layer[layer] = (stored_levels(dequantize), dequantize)
    return by_layer


def code_types(path: Path) -> dict[str, list[str]]:
    """The layers of a file, by the integer type that holds the codes of their weights, such as ``"INT4"``."""
    graph = ir.serde.deserialize_model(onnx.load(path)).graph
    layers: dict[str, list[str]] = {}
    for layer, (_, dequantize) in stored_codes(graph).items():
        codes = dequantize.inputs[0]
        assert codes is not None
        assert codes.dtype is not None
        layers.setdefault(codes.dtype.name, []).append(layer)
    return layers
