"""Tracing an integer model to an ONNX graph whose quantizers are QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import inspect
import itertools
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx.ops import symbolic

from cpq_lightning.errors import ExportError
from cpq_lightning.export.calls import forward_replaced, named_outputs
from cpq_lightning.export.integer_model import (
    InputGrid,
    IntegerLayer,
    IntegerTable,
    integer_layers,
    integer_tables,
    to_integer_model,
)
from cpq_lightning.export.samples import Samples

OPSET = 21
# Metadata of the nodes that this package adds to a graph: the name of the layer, and the role of the node in it.
LAYER, ROLE = "cpq.layer", "cpq.role"
# The role of nodes of a module that shares a layer's weight.
TABLE = "table"
# Metadata of a weight that is stored as a matrix, input channels first: the shape of the weight in its layer.
SHAPE = "cpq.shape"
# During the trace, an operator of this domain, with the layer's name as an attribute, dequantizes the weights.
# PyTorch's exporter would merge equal nodes of two layers that share a weight, and the second layer would be lost.
_DOMAIN, _NAME = "cpq", "layer"


class OnnxGrid(InputGrid):
    """An input's grid with codes as unsigned bytes, ``level - low``; the zero point is ``-low``.

    Runtimes are fastest with unsigned activations. A byte saturates at the lowest level, and with 8 bits also at the
    highest level; a narrower grid needs a Clip.
    """

    layer_name = ""

    def __init__(self, step: Tensor, low: int, high: int) -> None:
        super().__init__(step, low, high)
        self.register_buffer("scale", step.reshape(()).clone())
        self.register_buffer("zero_point", torch.tensor(-low, dtype=torch.uint8))
        self.register_buffer("bottom", torch.tensor(0, dtype=torch.uint8))
        self.register_buffer("top", torch.tensor(high - low, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        codes = self._emit("QuantizeLinear", x, self.scale, self.zero_point, dtype=torch.uint8)
        if self.high - self.low < 255:
            codes = self._emit("Clip", codes, self.bottom, self.top, dtype=torch.uint8)
        return self._emit("DequantizeLinear", codes, self.scale, self.zero_point, dtype=torch.float32)

    def _emit(self, op: str, *inputs: Any, dtype: torch.dtype) -> Tensor:
        return emit(op, inputs, {}, inputs[0].shape, dtype, {LAYER: self.layer_name, ROLE: "input"})


class OnnxLayer(IntegerLayer):
    """An integer layer whose weight is a DequantizeLinear of its codes."""

    layer_name = ""

    def dequantized(self) -> Tensor:
        return self._dequantized(self.weight_codes, self.channel_dim)

    def _dequantized(self, codes: Tensor, axis: int, **properties: str) -> Tensor:
        step, attributes = _scales(self, axis)
        attributes |= {_NAME: self.layer_name}
        inputs = (codes, step, torch.zeros_like(step, dtype=torch.int8))
        properties |= {LAYER: self.layer_name, ROLE: "weight"}
        return emit(f"{_DOMAIN}::DequantizeLinear", inputs, attributes, codes.shape, torch.float32, properties)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.base_class.forward is not nn.Linear.forward:
            return super().forward(input, *args, **kwargs)
        # The layer becomes a MatMul, for which runtimes have integer kernels.
        flat = input.dim() == 2
        # Of a MatMul of two matrices and its bias ONNX Runtime would make a float Gemm before it looks for integers.
        x = input.unsqueeze(1) if flat else input
        x = x if self.input_grid is None else self.input_grid(x)
        shape = json.dumps(list(self.weight_codes.shape))
        weight = self._dequantized(self.weight_codes.T.contiguous(), 1, **{SHAPE: shape})
        if self.input_grid is None or self.group_size:
            # With a 2d weight, ONNX Runtime would use a product that rounds the input to 8 bits (MatMulNBits), or of
            # groups one that takes a scale for each column only (MatMulIntegerToFloat).
            weight = weight.unsqueeze(0)
        # torch.matmul would count as a product of the parent module, whose products may be quantized.
        y = torch.ops.aten.matmul.default(x, weight)
        bias: Any = self.bias
        y = y if bias is None else y + bias
        return y.squeeze(1) if flat else y

    def prepared(self) -> Callable[[Tensor], Tensor]:
        # The exporter merges the equal nodes of all calls.
        return self


class OnnxTable(IntegerTable):
    """Traced stand-in for a module that shares its weight with a quantized layer.

    A look-up gathers rows of integers and dequantizes only these; any other use dequantizes the complete weight.
    """

    def dequantized(self) -> Tensor:
        return self._dequantize(self.weight_codes, *_scales(self, self.channel_dim))

    def look_up(self, index: Tensor) -> Tensor:
        if len(self.weight_step) > 1:
            return F.embedding(index, self.dequantized())
        shape = (*index.shape, self.weight_codes.shape[1])
        codes = emit("Gather", (self.weight_codes, index), {"axis": 0}, shape, torch.int8, self._properties)
        return self._dequantize(codes, self.weight_step.reshape(()), {})

    def _dequantize(self, codes: Tensor, step: Tensor, attributes: dict[str, Any]) -> Tensor:
        inputs = (codes, step, torch.zeros_like(step, dtype=torch.int8))
        return emit("DequantizeLinear", inputs, attributes, codes.shape, torch.float32, self._properties)

    @property
    def _properties(self) -> dict[str, str]:
        return {LAYER: self.source, ROLE: TABLE}


def _scales(module: OnnxLayer | OnnxTable, axis: int) -> tuple[Tensor, dict[str, Any]]:
    """The scales of a weight as DequantizeLinear takes them, and its attributes.

    Args:
        module: The module with the weight.
        axis: Dimension of the output channels in the codes; of groups, the inputs are the other dimension.
    """
    if module.group_size:
        step = module.steps_of_groups
        return step.T.contiguous() if axis else step, {"axis": 1 - axis, "block_size": module.group_size}
    if len(module.weight_step) > 1:
        return module.weight_step, {"axis": axis}
    return module.weight_step.reshape(()), {}


def emit(
    op: str,
    inputs: Sequence[Any],
    attributes: dict[str, Any],
    shape: Sequence[Any],
    dtype: torch.dtype,
    properties: dict[str, str],
) -> Tensor:
    """Add a node to the ONNX graph during a trace."""
    return symbolic(op, inputs, attributes, dtype=dtype, shape=shape, version=OPSET, metadata_props=properties)


def trace(model: nn.Module, samples: Samples) -> ir.Model:
    """Trace the integer model of an attached model to a graph; see :func:`trace_plain`."""
    network = to_integer_model(model, OnnxLayer, OnnxGrid, OnnxTable)
    for name, layer in integer_layers(network):
        assert isinstance(layer, OnnxLayer)
        layer.layer_name = name
    for module in [*(layer for _, layer in integer_layers(network)), *(table for _, table in integer_tables(network))]:
        # Shared codes are copied, because the exporter transposes only constants with a single user at export time.
        module.weight_codes = module.weight_codes.clone()
    for name, module in network.named_modules():
        if isinstance(module, OnnxGrid):
            module.layer_name = name.rpartition(".")[0]
    graph = trace_plain(network, samples)
    for node in graph.graph:
        if node.domain == _DOMAIN:
            node.domain = ""
            del node.attributes[_NAME]
    graph.opset_imports.pop(_DOMAIN, None)
    return graph


def trace_plain(network: nn.Module, samples: Samples) -> ir.Model:
    """Trace any network to a graph for any number of samples.

    A single input tensor is named ``input``; several are named after their arguments. A single output tensor is named
    ``output``; several are named by :func:`~cpq_lightning.export.calls.named_outputs`. Arguments that are constants
    become part of the graph.

    Raises:
        ValueError: the forward works for one number of samples only.
    """
    pair = samples.pair()
    names, _ = pair.places(network)
    names = ["input"] if len(names) == 1 else names
    output_names: list[str] = []
    original_forward, form = network.forward, pair.form
    assert form is not None

    def forward(*tensors: Tensor) -> list[Tensor]:
        args, kwargs = form.call(tensors)
        outputs = named_outputs(original_forward(*args, **kwargs))
        output_names[:] = [name for name, _ in outputs]
        return [tensor for _, tensor in outputs]

    batch = torch.export.Dim("batch", min=1)
    parameters = [inspect.Parameter(f"input_{i}", inspect.Parameter.POSITIONAL_ONLY) for i in range(len(names))]
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    try:
        exporter.setLevel(logging.ERROR)
        with (
            warnings.catch_warnings(),
            torch.no_grad(),
            forward_replaced(network, forward, inspect.Signature(parameters)),
        ):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network.eval(),
                pair.inputs,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=tuple({0: batch} if t.dim() else None for t in pair.inputs),
                verbose=False,
            )
    finally:
        exporter.setLevel(level)
    assert program is not None
    graph = program.model.graph
    for value, tensor in zip(graph.inputs, pair.inputs, strict=True):
        if tensor.dim() and (value.shape is None or isinstance(value.shape[0], int)):
            raise ExportError(
                f"The forward of {type(network).__name__} works for one number of samples only, because it uses len(x) "
                "or converts a size to a number: use x.shape[0], or x.flatten(1)."
            )
    _name_values(graph, names, output_names)
    return program.model


def _name_values(graph: ir.Graph, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Name the inputs and outputs of the graph; other values with one of these names are renamed."""
    wanted: dict[ir.Value, str] = {}
    taken: set[str] = set()
    for value, name in (*zip(graph.inputs, inputs, strict=True), *zip(graph.outputs, outputs, strict=True)):
        name = f"output.{name}" if name in taken else name
        # Keys may contain dots, so that two names may be equal.
        numbered = (f"{name}.{number}" for number in itertools.count(2))
        wanted[value] = next(n for n in itertools.chain([name], numbered) if n not in taken)
        taken.add(wanted[value])
    computed = (value for node in graph for value in node.outputs)
    for number, value in enumerate((*graph.initializers.values(), *computed)):
        if value.name in taken and value not in wanted:
            value.name = f"{value.name}.inner.{number}"
    for value, name in wanted.items():
        value.name = name
