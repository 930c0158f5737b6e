"""Helpers for ONNX graphs: constants, new nodes, and the producers and users of values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from cpq_lightning.export.onnx.trace import LAYER, ROLE

Array = NDArray[Any]


def constant_of(value: ir.Value | None) -> Array | None:
    """The array of a constant value; ``None`` where the value is not constant."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def known(value: ir.Value | None) -> Array:
    """The array of a value that must be constant."""
    array = constant_of(value)
    assert array is not None
    return array


def only_user(value: ir.Value) -> ir.Node | None:
    """The only user of a value; ``None`` where the value is used more than once or never, or is a graph output."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def made_by(value: ir.Value | None, op: str) -> ir.Node | None:
    """The node that computes a value, if its operator is ``op``; otherwise ``None``."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op else None


def integers(node: ir.Node, name: str, default: Sequence[int]) -> list[int]:
    """The value of an attribute that is a list of integers."""
    attribute = node.attributes.get(name)
    return list(default) if attribute is None else list(attribute.as_ints())


def integer(node: ir.Node, name: str, default: int) -> int:
    """The value of an attribute that is an integer."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def layer_of(node: ir.Node | None, role: str) -> str | None:
    """The layer of a node that has this role, such as ``"weight"`` or ``"input"``; otherwise ``None``."""
    if node is None or node.metadata_props.get(ROLE) != role:
        return None
    return node.metadata_props.get(LAYER)


def stored_levels(dequantize: ir.Node) -> Array:
    """The stored codes that a DequantizeLinear reads, minus their zero point."""
    codes, zero = (known(dequantize.inputs[i]).astype(np.int16) for i in (0, 2))
    axis, size = integer(dequantize, "axis", 1), block_size(dequantize)
    if size:
        zero = zero.repeat(size, axis).take(range(codes.shape[axis]), axis)
    elif zero.ndim:
        zero = zero.reshape([-1 if dim == axis else 1 for dim in range(codes.ndim)])
    return codes - zero


def block_size(dequantize: ir.Node) -> int:
    """The elements along ``axis`` that share a scale; 0 where these are all of them."""
    return integer(dequantize, "block_size", 0)


def scaled_along(dequantize: ir.Node, axis: int) -> bool:
    """Whether a DequantizeLinear has a single scale, or one scale per index of this dimension.

    Where layers of two types share a weight, the scales may be along the channel dimension of the other layer.
    """
    return known(dequantize.inputs[1]).ndim == 0 or integer(dequantize, "axis", 1) == axis


def note(value: ir.Value, key: str, text: str) -> None:
    """Set an entry in the metadata of the node that computes a value."""
    node = value.producer()
    assert node is not None
    node.metadata_props[key] = text


class Editor:
    """Adds nodes and constants with unique, descriptive names to a graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        # The numbers continue those of an earlier editor of the same graph.
        self._count = max((_number(node.name) for node in graph), default=0)

    def constant(self, name: str, array: Array) -> ir.Value:
        """Add an initializer; ``name`` gets a numeric suffix where it is taken."""
        while name in self.graph.initializers:
            self._count += 1
            name = f"{name}_{self._count}"
        value = ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            shape=ir.Shape(array.shape),
            const_value=ir.tensor(np.array(array, order="C"), name=name),
        )
        self.graph.register_initializer(value)
        return value

    def node(
        self,
        before: ir.Node,
        op: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any] | None = None,
        like: ir.Node | None = None,
    ) -> ir.Value:
        """Add a node before another one and return its output; the metadata of the node ``like`` is copied."""
        self._count += 1
        node = ir.node(op, inputs, attributes or {}, name=f"cpq_{op}_{self._count}")
        node.outputs[0].name = f"cpq_{op}_{self._count}_output"
        if like is not None:
            node.metadata_props.update(like.metadata_props)
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def weight(self, before: ir.Node, codes: Array, scale: Array, axis: int, like: ir.Node) -> ir.Value:
        """Add weight codes with one scale per channel and their DequantizeLinear; ``like`` is the previous one."""
        layer = layer_of(like, "weight")
        inputs = [
            self.constant(f"{layer}.weight_codes", codes),
            self.constant(f"{layer}.weight_scale", scale.astype(np.float32)),
            self.constant(f"{layer}.weight_zero_point", np.zeros(len(scale), codes.dtype)),
        ]
        return self.node(before, "DequantizeLinear", inputs, {"axis": axis}, like=like)

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Replace a value by another one in all users and in the graph's outputs, whose names stay."""
        if old.is_graph_output():
            name = old.name
            old.name = f"{name}_before"
            new.name = name
            new.shape, new.type = old.shape, old.type
        old.replace_all_uses_with(new, replace_graph_outputs=True)


def _number(name: str | None) -> int:
    prefix, _, number = (name or "").rpartition("_")
    return int(number) if prefix.startswith("cpq_") and number.isdigit() else 0


def nodes(graph: ir.Graph, op: str) -> Iterator[ir.Node]:
    """The nodes with the operator ``op``. The graph may change during the iteration."""
    yield from [node for node in graph if node.op_type == op]


def tidy(model: ir.Model) -> None:
    """Remove unused nodes and sort the others topologically."""
    RemoveUnusedNodesPass()(model)
    model.graph.sort()
