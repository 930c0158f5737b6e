"""Keep channels last across elementwise operators, so that matrix products need no transpositions."""

from __future__ import annotations

import onnx_ir as ir

from cpq_lightning.export.onnx.graph import Editor, constant_of, integers, note, tidy

# Metadata of a quantizer's node: its values are channels last.
LAST = "cpq.channels_last"
_TO_FIRST, _TO_LAST = [0, 3, 1, 2], [0, 2, 3, 1]
_ELEMENTWISE = {
    "Relu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Erf", "Gelu", "LeakyRelu", "Elu", "Neg", "Sqrt",
    "Add", "Sub", "Mul", "Div", "QuantizeLinear", "DequantizeLinear",
}  # fmt: skip


def keep_channels_last(model: ir.Model) -> None:
    """Move transpositions to channels first after elementwise operators, and remove pairs that cancel each other."""
    edit = Editor(model.graph)
    for node in list(model.graph):
        if node.op_type in _ELEMENTWISE:
            _pass_through(edit, node)
        elif _is(node, _TO_LAST):
            source = node.inputs[0]
            before = None if source is None else source.producer()
            if before is not None and _is(before, _TO_FIRST) and before.inputs[0] is not None:
                edit.replace(node.outputs[0], before.inputs[0])
    tidy(model)


def _is(node: ir.Node | None, permutation: list[int]) -> bool:
    return node is not None and node.op_type == "Transpose" and integers(node, "perm", ()) == permutation


def _pass_through(edit: Editor, node: ir.Node) -> None:
    """Compute an elementwise node on channels last, and transpose its output instead of its inputs."""
    last = [v is not None and _is(v.producer(), _TO_FIRST) for v in node.inputs]
    if not any(last):
        return
    inputs: list[ir.Value | None] = []
    for value, is_last in zip(node.inputs, last, strict=True):
        if is_last:
            assert value is not None
            source = value.producer()
            assert source is not None
            inputs.append(source.inputs[0])
            continue
        array = constant_of(value)
        if value is None or _rank(value) == 0 or (array is not None and array.shape == (1,)):
            inputs.append(value)
        elif array is not None and array.ndim in (3, 4):
            array_4d = array.reshape((1,) * (4 - array.ndim) + array.shape)
            inputs.append(edit.constant(f"{value.name}.last", array_4d.transpose(_TO_LAST)))
        elif array is None and _rank(value) == 4:
            inputs.append(edit.node(node, "Transpose", [value], {"perm": _TO_LAST}))
        else:
            return
    attributes = {k: v for k, v in node.attributes.items() if k != "axis"}
    result = edit.node(node, node.op_type, inputs, attributes, like=node)
    note(result, LAST, "1")
    back = edit.node(node, "Transpose", [result], {"perm": _TO_FIRST})
    back.type, back.shape = node.outputs[0].type, node.outputs[0].shape
    result.type = node.outputs[0].type
    edit.replace(node.outputs[0], back)
    edit.graph.remove(node, safe=True)


def _rank(value: ir.Value) -> int:
    if value.shape is not None:
        return len(value.shape)
    array = constant_of(value)
    return -1 if array is None else array.ndim
