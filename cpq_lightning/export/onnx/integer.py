"""Rewrite convolutions so that ONNX Runtime computes them exactly and with integer kernels.

The integer convolution of ONNX Runtime (QLinearConv) rounds its result to bytes, and its bias to a multiple of the
accumulator's unit. If the result goes to the quantizer of the next layer, only the rounding of the bias is an error,
and :func:`_as_convolution` keeps it small. If the result is needed in full precision, for example in a residual sum,
there is no integer convolution. Then :func:`_as_product` writes the convolution as a matrix product, for which an
integer kernel with float results exists (MatMulIntegerToFloat): sums of codes are exact integers, scaled once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cpq_lightning.export.onnx.graph import (
    Array,
    Editor,
    constant_of,
    integer,
    integers,
    known,
    layer_of,
    made_by,
    nodes,
    note,
    only_user,
    scaled_along,
    tidy,
)
from cpq_lightning.export.onnx.pairs import MAX_PAIR, largest_byte, largest_pair, quantizer_of
from cpq_lightning.export.onnx.trace import SHAPE

# Metadata of a weight's DequantizeLinear: stored codes are multiplied by 2 to this power, and the scale is divided by
# it.
SHIFT = "cpq.shift"
# Largest share of the next codes that the rounding of the bias may change by one level.
_MAX_CHANGED = 5e-4
# With fewer channels, the copies of the patches cost more time than the integer product saves.
_MIN_CHANNELS = 16


# Operators that ONNX Runtime moves a quantizer across, towards the convolution that computes its input.
_CROSSED_BY_QUANTIZERS = {"Relu", "Clip", "MaxPool", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice"}


@dataclass(frozen=True)
class _Conv:
    node: ir.Node
    dequantize_input: ir.Node
    dequantize_weight: ir.Node
    layer: str

    @property
    def codes(self) -> Array:
        return known(self.dequantize_weight.inputs[0])

    @property
    def weight_scale(self) -> Array:
        """One scale per output channel, float32."""
        return np.broadcast_to(known(self.dequantize_weight.inputs[1]), (self.codes.shape[0],)).astype(np.float32)

    @property
    def bias(self) -> Array | None:
        return constant_of(self.node.inputs[2]) if len(self.node.inputs) > 2 else None

    @property
    def unit(self) -> Array:
        """The value of one unit of the accumulator, per output channel: input scale times weight scale."""
        return known(self.dequantize_input.inputs[1]).astype(np.float32) * self.weight_scale


def use_integer_kernels(model: ir.Model, round_biases: bool = True) -> None:
    """Rewrite the quantized convolutions of a graph for integer kernels; those without an integer form stay unchanged.

    Args:
        model: The graph; changed in place.
        round_biases: Whether convolutions before a quantizer may have integer biases, the fastest form.
    """
    edit = Editor(model.graph)
    for node in nodes(model.graph, "Conv"):
        dequantize_input, dequantize_weight = (made_by(node.inputs[i], "DequantizeLinear") for i in (0, 1))
        layer = layer_of(dequantize_weight, "weight")
        if dequantize_input is None or dequantize_weight is None or layer is None:
            continue
        if only_user(dequantize_weight.outputs[0]) is not node:
            continue
        if not scaled_along(dequantize_weight, 0):
            continue
        conv = _Conv(node, dequantize_input, dequantize_weight, layer)
        if not (round_biases and _as_convolution(edit, conv)):
            _as_product(edit, conv)
    tidy(model)


def keep_biases(model: ir.Model) -> None:
    """Move full-precision biases out of convolutions before a quantizer, into an Add after the convolution.

    ONNX Runtime would round a bias in such a convolution to a multiple of the accumulator's unit (the transformer
    WeightBiasQuantization), which changes one percent of the codes of a low-bit layer.
    """
    edit = Editor(model.graph)
    for node in [n for op in ("Conv", "ConvTranspose") for n in nodes(model.graph, op)]:
        bias = constant_of(node.inputs[2]) if len(node.inputs) > 2 else None
        dequantize = made_by(node.inputs[1], "DequantizeLinear")
        if bias is None or dequantize is None or layer_of(dequantize, "weight") is None:
            continue
        if not _reaches_quantizer(node.outputs[0]):
            continue
        readers = [(use.node, use.idx) for use in node.outputs[0].uses()]
        name = str(node.inputs[2].name)  # type: ignore[union-attr]
        shaped = bias.reshape(-1, *[1] * (known(dequantize.inputs[0]).ndim - 2))
        node.resize_inputs(2)
        total = edit.node(readers[0][0], "Add", [node.outputs[0], edit.constant(name, shaped)])
        total.type, total.shape = node.outputs[0].type, node.outputs[0].shape
        for reader, index in readers:
            reader.replace_input_with(index, total)
    tidy(model)


def _reaches_quantizer(value: ir.Value) -> bool:
    users = [use.node for use in value.uses()]
    return any(
        user.op_type == "QuantizeLinear"
        or (user.op_type in _CROSSED_BY_QUANTIZERS and _reaches_quantizer(user.outputs[0]))
        for user in users
    )


def _as_convolution(edit: Editor, conv: _Conv) -> bool:
    """Give a convolution before a quantizer an integer bias, if the rounding of the bias changes almost no codes.

    With few bits, half a unit of the accumulator is a large part of the distance between two levels. Codes that use
    only the lower bits of a byte are therefore stored shifted to the left, with a scale that is smaller by the same
    factor: the weights are exactly the same, and the unit is finer.
    """
    following = only_user(conv.node.outputs[0])
    if following is None or following.op_type != "QuantizeLinear" or layer_of(following, "input") is None:
        return False
    if len(conv.codes.shape) != 4:
        return False
    shift = _free_bits(conv)
    unit = conv.unit / np.float32(2**shift)
    bias = np.zeros(len(unit), np.float32) if conv.bias is None else conv.bias
    bias_codes = np.round(bias / unit.astype(np.float64))
    changed = np.abs(bias - bias_codes * unit).mean() / float(known(following.inputs[1]))
    if changed > _MAX_CHANGED or np.abs(bias_codes).max(initial=0) >= 2**30:
        return False
    layer, node = conv.layer, conv.node
    zeros = np.zeros(len(unit), np.int32)
    scale = conv.weight_scale / np.float32(2**shift)
    weight = edit.weight(node, conv.codes << shift, scale, 0, like=conv.dequantize_weight)
    note(weight, SHIFT, str(shift))
    node.replace_input_with(1, weight)
    if conv.bias is not None:
        inputs = [
            edit.constant(f"{layer}.bias_codes", bias_codes.astype(np.int32)),
            edit.constant(f"{layer}.bias_scale", unit),
            edit.constant(f"{layer}.bias_zero_point", zeros),
        ]
        node.replace_input_with(2, edit.node(node, "DequantizeLinear", inputs, {"axis": 0}))
    return True


def _free_bits(conv: _Conv) -> int:
    """By how many bits codes can be shifted to the left so that they fit into a byte, and two products into 16 bits."""
    codes = conv.codes.astype(np.int16)
    largest = int(np.maximum(codes, -codes - 1).max(initial=0))
    shift = 7 - largest.bit_length()
    quantize = quantizer_of(conv.node.inputs[0])
    byte = 255 if quantize is None else largest_byte(quantize)
    while shift and largest_pair(codes << shift, 0, byte) > MAX_PAIR:
        shift -= 1
    return shift


def _as_product(edit: Editor, conv: _Conv) -> None:
    """Write a 2d convolution as the matrix product of its input patches (channels last) and its weight."""
    node, codes = conv.node, conv.codes
    size = _input_size(conv)
    if size is None or codes.ndim != 4 or integer(node, "group", 1) != 1:
        return
    height, width = codes.shape[2:]
    if codes.shape[1] < _MIN_CHANNELS and (height, width) != (1, 1):
        return
    scale, zero = conv.dequantize_input.inputs[1:3]
    patches = _patches(edit, conv, size)
    dequantized = edit.node(node, "DequantizeLinear", [patches, scale, zero], like=conv.dequantize_input)
    matrix = codes.transpose(2, 3, 1, 0).reshape(-1, codes.shape[0])
    weight = edit.weight(node, matrix, conv.weight_scale, 1, like=conv.dequantize_weight)
    note(weight, SHAPE, json.dumps(codes.shape))
    result = edit.node(node, "MatMul", [dequantized, weight], like=node)
    if conv.bias is not None:
        result = edit.node(node, "Add", [result, edit.constant(f"{conv.layer}.bias", conv.bias)])
    edit.replace(node.outputs[0], edit.node(node, "Transpose", [result], {"perm": [0, 3, 1, 2]}))
    edit.graph.remove(node, safe=True)


def _input_size(conv: _Conv) -> tuple[int, int] | None:
    value = conv.dequantize_input.outputs[0]
    if value.shape is None or len(value.shape) != 4:
        return None
    height, width = value.shape[2], value.shape[3]
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _patches(edit: Editor, conv: _Conv, size: tuple[int, int]) -> ir.Value:
    """Patches of the input codes (im2col), shape (batch, height, width, kernel height · kernel width · channels)."""
    node, layer = conv.node, conv.layer
    channels, *kernel = conv.codes.shape[1:]
    stride, dilation = integers(node, "strides", (1, 1)), integers(node, "dilations", (1, 1))
    pads = integers(node, "pads", (0, 0, 0, 0))
    zero = conv.dequantize_input.inputs[2]
    x = edit.node(node, "Transpose", [conv.dequantize_input.inputs[0]], {"perm": [0, 2, 3, 1]})

    def constant(name: str, values: object) -> ir.Value:
        return edit.constant(f"{layer}.{name}", np.array(values, np.int64))

    if any(pads):
        x = edit.node(node, "Pad", [x, constant("pads", [0, *pads[:2], 0, 0, *pads[2:], 0]), zero])
    padded = [size[i] + pads[i] + pads[i + 2] for i in (0, 1)]
    out = [(padded[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    if [*kernel, *stride] == [1, 1, 1, 1]:
        return x
    # The indices are sums of three short arrays; a runtime computes the sums once, when it loads the graph.
    rows = np.arange(out[0]).reshape(-1, 1, 1) * stride[0] * padded[1]
    columns = np.arange(out[1]).reshape(-1, 1) * stride[1]
    taps = (np.arange(kernel[0])[:, None] * dilation[0] * padded[1] + np.arange(kernel[1]) * dilation[1]).reshape(-1)
    indices = edit.node(node, "Add", [constant("rows", rows), constant("columns", columns)])
    indices = edit.node(node, "Add", [indices, constant("taps", taps)])
    indices = edit.node(node, "Reshape", [indices, constant("flat", [-1])])
    x = edit.node(node, "Reshape", [x, constant("places", [0, padded[0] * padded[1], channels])])
    x = edit.node(node, "Gather", [x, indices], {"axis": 1})
    return edit.node(node, "Reshape", [x, constant("patches", [0, *out, kernel[0] * kernel[1] * channels])])
