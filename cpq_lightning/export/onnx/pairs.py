"""Products of a layer's input with its weight, and the risk that the sum of two such products saturates.

Processors multiply bytes in different ways. x86 without VNNI adds two products of an unsigned byte (the input) and a
signed byte (the weight) in 16 bits, and the sum saturates. ARM without dot products makes both bytes signed, and also
adds two products in 16 bits. Products of two unsigned bytes are added in 32 bits on all processors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cpq_lightning.export.onnx.graph import Array, block_size, integer, known, layer_of, only_user

# The largest sum of two products that fits into 16 bits.
MAX_PAIR = 2**15 - 1
# Operators between a quantizer and a product that do not compute new codes.
_PASSED = {
    "Transpose",
    "Reshape",
    "Gather",
    "Pad",
    "Slice",
    "Concat",
    "DequantizeLinear",
    "Clip",
    "Squeeze",
    "Unsqueeze",
}


@dataclass(frozen=True)
class Product:
    """A product in the graph, and the producers of its operands.

    Attributes:
        node: The node that multiplies.
        first: The QuantizeLinear of the first operand; ``None`` where that is in full precision.
        second: In a product without a weight, the QuantizeLinear of the second operand; otherwise ``None``.
        weight: The DequantizeLinear of the weight that is the second operand; ``None`` where it is no quantized weight.
    """

    node: ir.Node
    first: ir.Node | None
    second: ir.Node | None
    weight: ir.Node | None


def products(graph: ir.Graph) -> Iterator[Product]:
    """The convolutions and matrix products, in the order of the graph."""
    for node in graph:
        if node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm"):
            first, second = (quantizer_of(side) for side in node.inputs[:2])
            weight = None if second is not None else _back(node.inputs[1], None, _dequantizes_weight)
            yield Product(node, first, second, weight)


def quantizer_of(value: ir.Value | None) -> ir.Node | None:
    """The QuantizeLinear that computed the codes of a value."""
    return _back(value, _PASSED, _quantizes_input)


def cut_off(graph: ir.Graph) -> list[Product]:
    """Products of a quantized input and a weight with signed codes that may saturate when two are added in 16 bits."""
    return [product for product in products(graph) if largest_pair_of(product) > MAX_PAIR]


def largest_pair_of(product: Product) -> int:
    """:func:`largest_pair` of a product with its stored codes; 0 where no kernel adds two products in 16 bits."""
    # No integer kernel takes a weight with groups.
    if product.first is None or product.weight is None or block_size(product.weight):
        return 0
    codes = known(product.weight.inputs[0])
    return 0 if codes.dtype == np.uint8 else largest_pair(codes, _channel_dim(product), largest_byte(product.first))


def largest_pair(codes: Array, channel_dim: int | None, byte: int) -> int:
    """The largest ``|a · v + b · w|`` of two products in one output, with ``a`` and ``b`` from 0 to ``byte``.

    The order of the sum depends on the kernel, so any two weights ``v`` and ``w`` of an output may be added as a pair.

    Args:
        codes: The weight as signed bytes.
        channel_dim: The dimension of the output channels; ``None`` where it is unknown: then any two codes are a pair.
        byte: The largest absolute value of the input, see :func:`largest_byte`.
    """
    wide = codes.astype(np.int16)
    rows = wide.reshape(1, -1) if channel_dim is None else np.moveaxis(wide, channel_dim, 0)
    ordered = np.sort(rows.reshape(len(rows), -1), axis=1)
    positive, negative = ordered[:, -2:].clip(min=0).sum(1), ordered[:, :2].clip(max=0).sum(1)
    return byte * int(max(positive.max(initial=0), -negative.min(initial=0)))


def largest_byte(quantize: ir.Node) -> int:
    """The largest absolute value that kernels multiply for a quantizer's codes.

    Kernels for x86 use the codes as unsigned bytes, kernels for ARM subtract 128 and use them as signed bytes.
    """
    zero = known(quantize.inputs[2])
    clip = only_user(quantize.outputs[0])
    lowest, top = np.iinfo(zero.dtype).min, np.iinfo(zero.dtype).max
    if clip is not None and clip.op_type == "Clip":
        top = int(known(clip.inputs[2]))
    # A convolution pads its input with the zero point, which may lie above the highest code.
    return max(max(top, int(zero.max())) - lowest, 128)


def _channel_dim(product: Product) -> int | None:
    value = product.node.inputs[1]
    if value is None or value.producer() is not product.weight:
        return None
    kind = product.node.op_type
    return 0 if kind == "Conv" or (kind == "Gemm" and integer(product.node, "transB", 0)) else 1


def _dequantizes_weight(node: ir.Node) -> bool:
    return node.op_type == "DequantizeLinear" and layer_of(node, "weight") is not None


def _quantizes_input(node: ir.Node) -> bool:
    return node.op_type == "QuantizeLinear" and layer_of(node, "input") is not None


def _back(value: ir.Value | None, through: set[str] | None, wanted: Callable[[ir.Node], bool]) -> ir.Node | None:
    """The nearest node before a value that is wanted.

    The search goes through the first inputs of the operators in ``through``; where that is ``None``, through all inputs
    of all operators.
    """
    node = None if value is None else value.producer()
    if node is None or wanted(node):
        return node
    if through is not None and node.op_type not in through:
        return None
    inputs = node.inputs if through is None else node.inputs[:1]
    return next((n for v in inputs if (n := _back(v, through, wanted)) is not None), None)
