"""Modules that are tied to a layer, such as an embedding: they read the layer's codes, as the file holds them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from cpq_lightning.export.onnx.graph import Editor, integer, known, layer_of, made_by, nodes, tidy
from cpq_lightning.export.onnx.trace import TABLE


def read_codes_of_layers(model: ir.Model) -> None:
    """Let what is tied to a layer read the tensor of codes that decodes to the layer's weight.

    That may hold them the other way round, as a linear layer's, with another zero point, or two in a byte; those of
    less than a byte are looked up once they are decoded. Where a layer's codes are others, as behind a batch norm that
    has turned some, what is tied to it keeps its own.
    """
    edit = Editor(model.graph)
    layers = {layer_of(node, "weight"): node for node in reversed(list(nodes(model.graph, "DequantizeLinear")))}
    for node in nodes(model.graph, "DequantizeLinear"):
        decode = layers.get(layer_of(node, TABLE) or "")
        if decode is None:
            continue
        gather = made_by(node.inputs[0], "Gather")
        codes = known(node.inputs[0] if gather is None else gather.inputs[0])
        turned = _is_turned(decode, codes)
        if turned is None:
            continue
        if gather is None:
            whole = decode.outputs[0]
            edit.replace(node.outputs[0], edit.node(node, "Transpose", [whole], {"perm": [1, 0]}) if turned else whole)
            continue
        in_bytes = known(decode.inputs[0]).dtype in (np.int8, np.uint8)
        source = decode.inputs[0] if in_bytes else decode.outputs[0]
        found = edit.node(node, "Gather", [source, gather.inputs[1]], {"axis": int(turned)}, like=gather)
        if turned:
            assert node.outputs[0].shape is not None
            found = edit.node(node, "Transpose", [found], {"perm": [*range(1, len(node.outputs[0].shape)), 0]})
        if in_bytes:
            found = edit.node(node, "DequantizeLinear", [found, *decode.inputs[1:3]], like=node)
        found.type, found.shape = node.outputs[0].type, node.outputs[0].shape
        edit.replace(node.outputs[0], found)
    tidy(model)


def _is_turned(decode: ir.Node, codes: np.ndarray) -> bool | None:
    """Whether a layer's codes are others' the other way round; ``None`` where they are not the same."""
    own, zero = (known(decode.inputs[i]).astype(np.int16) for i in (0, 2))
    if zero.ndim:
        zero = zero.reshape([-1 if dim == integer(decode, "axis", 1) else 1 for dim in range(own.ndim)])
    own = own - zero
    return False if np.array_equal(own, codes) else True if np.array_equal(own.T, codes) else None
