"""Fold a batch norm into the convolution before it: into the scale of the weight, and into the bias."""

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

# Metadata of a Conv's node: the name of the batch norm that was folded into it.
NORM = "cpq.norm"
_SCOPES, _CLASSES = "pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy"


@dataclass(frozen=True)
class _Affine:
    """``y = gain · x + shift``, with one gain and one shift per channel."""

    gain: Array
    shift: Array


def fold_norms(model: ir.Model, lowest: Callable[[Array], int]) -> None:
    """Fold each batch norm whose input is a quantized convolution that nothing else reads. Codes keep their magnitudes.

    ``norm(scale · codes * x + b) = (scale · |gain|) · (sign(gain) · codes) * x + shift``, with
    ``gain = γ / sqrt(var + ε)`` and ``shift = β + gain · (b - mean)``. A negative gain negates the codes of its
    channel; with a gain of zero the codes are zero and only the shift remains. If a negated code does not fit into the
    container, the norm is not folded.

    Args:
        model: A traced graph; changed in place.
        lowest: Gives the lowest level of the container for an array of codes: -128 for int8, whose highest is 127.
    """
    graph = model.graph
    edit = Editor(graph)
    for norm in nodes(graph, "BatchNormalization"):
        source = norm.inputs[0]
        conv = None if source is None else source.producer()
        if conv is None or source is None or only_user(source) is not norm:
            continue
        dequantize = made_by(conv.inputs[1], "DequantizeLinear") if conv.op_type in ("Conv", "ConvTranspose") else None
        layer = layer_of(dequantize, "weight")
        # The output channels of a grouped transposed convolution are no dimension of its weight.
        if dequantize is None or layer is None or (conv.op_type == "ConvTranspose" and integer(conv, "group", 1) > 1):
            continue
        if only_user(dequantize.outputs[0]) is not conv:
            continue
        axis = 1 if conv.op_type == "ConvTranspose" else 0
        if not scaled_along(dequantize, axis) or not _is_batch_norm(norm):
            continue
        affine = _affine(norm, conv)
        codes = known(dequantize.inputs[0])
        codes = _with_sign(codes, np.sign(affine.gain), axis, lowest(codes))
        if codes is None:
            continue
        scale = np.where(affine.gain == 0, 1, np.abs(affine.gain)) * known(dequantize.inputs[1]).astype(np.float64)
        conv.replace_input_with(1, edit.weight(conv, codes, scale, axis, like=dequantize))
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


def _with_sign(codes: Array, sign: Array, axis: int, lowest: int) -> Array | None:
    """Multiply codes by the signs of the gains; ``None`` where a product exceeds the highest level."""
    shape = [1] * codes.ndim
    shape[axis] = -1
    signed = codes.astype(np.int16) * sign.astype(np.int16).reshape(shape)
    return None if signed.max(initial=0) > -lowest - 1 else signed.astype(codes.dtype)


def _is_batch_norm(node: ir.Node) -> bool:
    """Whether the node was traced from a batch norm module: other modules may compute the gain differently."""
    classes = node.metadata_props.get(_CLASSES, "[]").strip("[]").split(",")
    return len(classes) > 1 and "BatchNorm" in classes[-2]


def _module_name(node: ir.Node) -> str:
    """The dotted name of the module that a node was traced from."""
    scopes = node.metadata_props.get(_SCOPES, "[]")
    names = [part.strip(" '\"") for part in scopes.strip("[]").split(",")]
    return names[-2] if len(names) > 1 else ""
