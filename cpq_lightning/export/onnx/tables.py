"""Modules that share their weight with a quantized layer, such as an embedding, read that layer's integers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from cpq_lightning.export.onnx.graph import Editor, known, layer_of, made_by, nodes, stored_levels, tidy
from cpq_lightning.export.onnx.trace import TABLE


def read_codes_of_layers(model: ir.Model) -> None:
    """Let modules that share a layer's weight read the tensor of integers that is stored for the layer.

    The stored integers may be transposed (those of a linear layer are), may have another zero point, or may be packed
    two in a byte; these are dequantized before the look-up. Where the stored integers differ from the module's, because
    a folded batch norm has negated some, the module keeps a tensor of its own.
    """
    edit = Editor(model.graph)
    layers = {layer_of(node, "weight"): node for node in reversed(list(nodes(model.graph, "DequantizeLinear")))}
    for node in nodes(model.graph, "DequantizeLinear"):
        dequantize = layers.get(layer_of(node, TABLE) or "")
        if dequantize is None:
            continue
        gather = made_by(node.inputs[0], "Gather")
        codes = known(node.inputs[0] if gather is None else gather.inputs[0])
        transposed = _is_transposed(dequantize, codes)
        if transposed is None:
            continue
        if gather is None:
            weight = dequantize.outputs[0]
            table = edit.node(node, "Transpose", [weight], {"perm": [1, 0]}) if transposed else weight
            edit.replace(node.outputs[0], table)
            continue
        in_bytes = known(dequantize.inputs[0]).dtype in (np.int8, np.uint8)
        source = dequantize.inputs[0] if in_bytes else dequantize.outputs[0]
        rows = edit.node(node, "Gather", [source, gather.inputs[1]], {"axis": int(transposed)}, like=gather)
        if transposed:
            assert node.outputs[0].shape is not None
            rows = edit.node(node, "Transpose", [rows], {"perm": [*range(1, len(node.outputs[0].shape)), 0]})
        if in_bytes:
            rows = edit.node(node, "DequantizeLinear", [rows, *dequantize.inputs[1:3]], like=node)
        rows.type, rows.shape = node.outputs[0].type, node.outputs[0].shape
        edit.replace(node.outputs[0], rows)
    tidy(model)


def _is_transposed(dequantize: ir.Node, codes: np.ndarray) -> bool | None:
    """Whether a layer stores the transpose of ``codes``; ``None`` where it stores neither them nor their transpose."""
    stored = stored_levels(dequantize)
    return False if np.array_equal(stored, codes) else True if np.array_equal(stored.T, codes) else None
