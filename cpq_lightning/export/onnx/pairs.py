"""Products of a layer's input with its weight, and what two of them add up to.

Processors multiply bytes in different ways. x86 without VNNI adds two products of an unsigned byte (the input) and a
signed one (the weight) in 16 bits, and cuts off what is larger. ARM without dot products makes both signed and adds
two products in 16 bits too. Products of two unsigned bytes are added in 32 bits everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cpq_lightning.export.onnx.graph import Array, integer, known, layer_of, only_user

# The largest sum of two products that 16 bits hold.
MOST = 2**15 - 1
# What leaves codes as they are, between a quantizer and the product that reads them.
_MOVES = {
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
    """A product in the graph, and where its sides come from.

    Attributes:
        node: What multiplies.
        first: The QuantizeLinear of its first side; ``None`` where that is in full precision.
        second: The same of its second side, of products without a weight.
        weight: The DequantizeLinear of the layer's weight that is its second side; ``None`` where that is none.
    """

    node: ir.Node
    first: ir.Node | None
    second: ir.Node | None
    weight: ir.Node | None


def products(graph: ir.Graph) -> Iterator[Product]:
    """Convolutions and products of matrices, in the order of the graph."""
    for node in graph:
        if node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm"):
            first, second = (quantizer_of(side) for side in node.inputs[:2])
            weight = None if second is not None else _back(node.inputs[1], None, _decodes_weight)
            yield Product(node, first, second, weight)


def quantizer_of(value: ir.Value | None) -> ir.Node | None:
    """The QuantizeLinear whose codes a value holds."""
    return _back(value, _MOVES, _quantizes_input)


def cut_off(graph: ir.Graph) -> list[Product]:
    """Products of a quantized input and a weight of signed codes, two of which may be more than 16 bits hold."""
    return [product for product in products(graph) if largest_pair_of(product) > MOST]


def largest_pair_of(product: Product) -> int:
    """:func:`largest_pair` of a product as it is stored; 0 where no kernel adds up two of its products in 16 bits."""
    if product.first is None or product.weight is None:
        return 0
    codes = known(product.weight.inputs[0])
    return 0 if codes.dtype == np.uint8 else largest_pair(codes, _channel_dim(product), largest_byte(product.first))


def largest_pair(codes: Array, channel_dim: int | None, byte: int) -> int:
    """The largest ``|a · v + b · w|`` of two products in one output, with ``a`` and ``b`` from 0 to ``byte``.

    Kernels sum up in an order of their own: any two weights of an output may meet.

    Args:
        codes: The weight as signed bytes.
        channel_dim: The dimension of its output channels; ``None`` where it is not known, and any two codes may meet.
        byte: See :func:`largest_byte`.
    """
    whole = codes.astype(np.int16)
    rows = whole.reshape(1, -1) if channel_dim is None else np.moveaxis(whole, channel_dim, 0)
    ordered = np.sort(rows.reshape(len(rows), -1), axis=1)
    above, below = ordered[:, -2:].clip(min=0).sum(1), ordered[:, :2].clip(max=0).sum(1)
    return byte * int(max(above.max(initial=0), -below.min(initial=0)))


def largest_byte(quantize: ir.Node) -> int:
    """The largest absolute value that kernels multiply for a quantizer's codes: as unsigned bytes, as x86 needs them,
    or as signed ones, which ARM makes of them by taking off 128.
    """
    zero = known(quantize.inputs[2])
    clip = only_user(quantize.outputs[0])
    lowest, top = np.iinfo(zero.dtype).min, np.iinfo(zero.dtype).max
    if clip is not None and clip.op_type == "Clip":
        top = int(known(clip.inputs[2]))
    # Zeros are put around the input of a convolution, whatever its codes are.
    return max(max(top, int(zero.max())) - lowest, 128)


def _channel_dim(product: Product) -> int | None:
    value = product.node.inputs[1]
    if value is None or value.producer() is not product.weight:
        return None
    kind = product.node.op_type
    return 0 if kind == "Conv" or (kind == "Gemm" and integer(product.node, "transB", 0)) else 1


def _decodes_weight(node: ir.Node) -> bool:
    return node.op_type == "DequantizeLinear" and layer_of(node, "weight") is not None


def _quantizes_input(node: ir.Node) -> bool:
    return node.op_type == "QuantizeLinear" and layer_of(node, "input") is not None


def _back(value: ir.Value | None, through: set[str] | None, wanted: Callable[[ir.Node], bool]) -> ir.Node | None:
    """The nearest node before a value, along first inputs (or all, of any operation), that is wanted."""
    node = None if value is None else value.producer()
    if node is None or wanted(node):
        return node
    if through is not None and node.op_type not in through:
        return None
    inputs = node.inputs if through is None else node.inputs[:1]
    return next((n for v in inputs if (n := _back(v, through, wanted)) is not None), None)
