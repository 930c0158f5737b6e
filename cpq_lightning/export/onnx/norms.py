"""A batch norm behind a convolution becomes part of it: of its weight's scale, and of its bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cpq_lightning.export.onnx.graph import (
    Array,
    Editor,
    constant_of,
    integer,
    known,
    layer_of,
    made_by,
    nodes,
    only_user,
    scaled_along,
    tidy,
)

# Of a Conv's node: which batch norm it holds.
NORM = "cpq.norm"
_SCOPES, _CLASSES = "pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy"


@dataclass(frozen=True)
class _Affine:
    """``y = gain · x + shift``, a channel each."""

    gain: Array
    shift: Array


def fold_norms(model: ir.Model, lowest: Callable[[Array], int]) -> None:
    """Fold each batch norm whose input is a quantized convolution and nothing else; codes stay what they are.

    ``norm(step · codes * x + b) = (step · |gain|) · (sign(gain) · codes) * x + shift``, ``gain = γ / sqrt(var + ε)``,
    ``shift = β + gain · (b - mean)``: a negative gain turns a channel's codes round, a gain of zero leaves its shift.
    Where a code that would have to be turned has no counterpart in the container, the norm stays.

    Args:
        model: A traced graph; changed in place.
        lowest: The lowest level that the container of some codes holds: of int8 -128, and 127 is the highest.
    """
    graph = model.graph
    edit = Editor(graph)
    for norm in nodes(graph, "BatchNormalization"):
        source = norm.inputs[0]
        conv = None if source is None else source.producer()
        if conv is None or source is None or only_user(source) is not norm:
            continue
        decode = made_by(conv.inputs[1], "DequantizeLinear") if conv.op_type in ("Conv", "ConvTranspose") else None
        layer = layer_of(decode, "weight")
        # The channels of a grouped transposed convolution are not one dimension of its weight.
        if decode is None or layer is None or (conv.op_type == "ConvTranspose" and integer(conv, "group", 1) > 1):
            continue
        if only_user(decode.outputs[0]) is not conv:
            continue
        axis = 1 if conv.op_type == "ConvTranspose" else 0
        if not scaled_along(decode, axis) or not _is_batch_norm(norm):
            continue
        affine = _affine(norm, conv)
        codes = known(decode.inputs[0])
        codes = _turned(codes, np.sign(affine.gain), axis, lowest(codes))
        if codes is None:
            continue
        scale = np.where(affine.gain == 0, 1, np.abs(affine.gain)) * known(decode.inputs[1]).astype(np.float64)
        conv.replace_input_with(1, edit.weight(conv, codes, scale, axis, like=decode))
        if len(conv.inputs) < 3:
            conv.resize_inputs(3)
        conv.replace_input_with(2, edit.constant(f"{layer}.bias", affine.shift.astype(np.float32)))
        conv.metadata_props[NORM] = _module_name(norm)
        edit.replace(norm.outputs[0], conv.outputs[0])
        graph.remove(norm, safe=True)
    tidy(model)


def _affine(norm: ir.Node, conv: ir.Node) -> _Affine:
    gamma, beta, mean, var = (known(v).astype(np.float64) for v in norm.inputs[1:5])
    epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
    gain = gamma / np.sqrt(var + epsilon)
    bias = constant_of(conv.inputs[2]) if len(conv.inputs) > 2 else None
    return _Affine(gain, beta + gain * ((0.0 if bias is None else bias.astype(np.float64)) - mean))


def _turned(codes: Array, sign: Array, axis: int, lowest: int) -> Array | None:
    shape = [1] * codes.ndim
    shape[axis] = -1
    turned = codes.astype(np.int16) * sign.astype(np.int16).reshape(shape)
    return None if turned.max(initial=0) > -lowest - 1 else turned.astype(codes.dtype)


def _is_batch_norm(node: ir.Node) -> bool:
    """Whether a batch norm's module computes it: another's forward may have its own idea of the gain."""
    classes = node.metadata_props.get(_CLASSES, "[]").strip("[]").split(",")
    return len(classes) > 1 and "BatchNorm" in classes[-2]


def _module_name(node: ir.Node) -> str:
    """The dotted name of the module that a node was traced from."""
    scopes = node.metadata_props.get(_SCOPES, "[]")
    names = [part.strip(" '\"") for part in scopes.strip("[]").split(",")]
    return names[-2] if len(names) > 1 else ""
