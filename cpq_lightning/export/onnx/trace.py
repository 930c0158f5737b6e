"""From a coded model to an ONNX graph whose quantizers are QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import inspect
import itertools
import json
import logging
import warnings
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx.ops import symbolic

from cpq_lightning.export.calls import forward_replaced, named_outputs
from cpq_lightning.export.integer_model import CodedTable, InputGrid, IntegerLayer, coded, coded_layers, coded_tables
from cpq_lightning.export.samples import Samples

OPSET = 21
# Metadata of the nodes that this package puts into a graph: of which layer, and what they do there.
LAYER, ROLE = "cpq.layer", "cpq.role"
# The role of what is tied to a layer and reads its weight.
TABLE = "table"
# Of a weight that is stored as a matrix, input channels first: the shape that it has in its layer.
SHAPE = "cpq.shape"
# While a graph is traced, weights are decoded by an operator of this domain that names its layer: PyTorch's exporter
# makes one node of those that compute the same, and of two layers with one weight the second would be lost.
_DOMAIN, _NAME = "cpq", "layer"


class OnnxGrid(InputGrid):
    """An input's grid as unsigned bytes, ``level - low``: the lowest level is the zero point's negative.

    Runtimes compute fastest with unsigned activations; a byte saturates at the grid's lower end by itself, and from 8
    bits on at its upper end, which narrower grids need a Clip for.
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
    """A layer whose weight is a DequantizeLinear of its codes."""

    layer_name = ""

    @property
    def weight(self) -> Tensor:
        return self._decoded(self.weight_codes, self.channel_dim)

    def _decoded(self, codes: Tensor, axis: int, **properties: str) -> Tensor:
        per_channel = len(self.weight_step) > 1
        step = self.weight_step if per_channel else self.weight_step.reshape(())
        attributes = {_NAME: self.layer_name} | ({"axis": axis} if per_channel else {})
        inputs = (codes, step, torch.zeros_like(step, dtype=torch.int8))
        properties |= {LAYER: self.layer_name, ROLE: "weight"}
        return emit(f"{_DOMAIN}::DequantizeLinear", inputs, attributes, codes.shape, torch.float32, properties)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.base_class.forward is not nn.Linear.forward:
            return super().forward(input, *args, **kwargs)
        # As a product of matrices, which runtimes know how to compute with integers.
        flat = input.dim() == 2
        # ONNX Runtime joins a product of two matrices with its bias to a Gemm, in floats, before it looks for integers.
        x = input.unsqueeze(1) if flat else input
        x = x if self.input_grid is None else self.input_grid(x)
        shape = json.dumps(list(self.weight_codes.shape))
        weight = self._decoded(self.weight_codes.T.contiguous(), 1, **{SHAPE: shape})
        if self.input_grid is None:
            # Of a matrix alone ONNX Runtime makes a product that rounds the other side to 8 bits (MatMulNBits).
            weight = weight.unsqueeze(0)
        # An operator rather than torch.matmul: it is no product of the module around it, whose own may be quantized.
        y = torch.ops.aten.matmul.default(x, weight)
        bias: Any = self.bias
        y = y if bias is None else y + bias
        return y.squeeze(1) if flat else y


class OnnxTable(CodedTable):
    """A module that is tied to a layer: it looks codes up and decodes them, or decodes them all."""

    def decoded(self) -> Tensor:
        step = self.weight_step if len(self.weight_step) > 1 else self.weight_step.reshape(())
        return self._decode(self.weight_codes, step, {"axis": self.channel_dim} if step.dim() else {})

    def look_up(self, index: Tensor) -> Tensor:
        if len(self.weight_step) > 1:
            return F.embedding(index, self.decoded())
        shape = (*index.shape, self.weight_codes.shape[1])
        codes = emit("Gather", (self.weight_codes, index), {"axis": 0}, shape, torch.int8, self._properties)
        return self._decode(codes, self.weight_step.reshape(()), {})

    def _decode(self, codes: Tensor, step: Tensor, attributes: dict[str, Any]) -> Tensor:
        inputs = (codes, step, torch.zeros_like(step, dtype=torch.int8))
        return emit("DequantizeLinear", inputs, attributes, codes.shape, torch.float32, self._properties)

    @property
    def _properties(self) -> dict[str, str]:
        return {LAYER: self.source, ROLE: TABLE}


def emit(
    op: str,
    inputs: Sequence[Any],
    attributes: dict[str, Any],
    shape: Sequence[Any],
    dtype: torch.dtype,
    properties: dict[str, str],
) -> Tensor:
    """A node of the ONNX graph that is being traced."""
    return symbolic(op, inputs, attributes, dtype=dtype, shape=shape, version=OPSET, metadata_props=properties)


def trace(model: nn.Module, samples: Samples) -> ir.Model:
    """The graph of an attached model; see :func:`trace_plain`."""
    network = coded(model, OnnxLayer, OnnxGrid, OnnxTable)
    for name, layer in coded_layers(network):
        assert isinstance(layer, OnnxLayer)
        layer.layer_name = name
    for module in [*(layer for _, layer in coded_layers(network)), *(table for _, table in coded_tables(network))]:
        # The exporter turns a constant round that is read once, and leaves one that others read to the graph.
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
    """The graph of any network, any number of samples.

    A tensor that comes in alone is ``input``, several are named after the arguments that they are or are in; one that
    goes out alone is ``output``, several are named as :func:`~cpq_lightning.export.calls.named_outputs` says.
    Constants among the arguments are part of the graph.
    """
    pair = samples.pair()
    names, _ = pair.places(network)
    names = ["input"] if len(names) == 1 else names
    returned: list[str] = []
    own, form = network.forward, pair.form
    assert form is not None

    def forward(*tensors: Tensor) -> list[Tensor]:
        args, kwargs = form.call(tensors)
        outputs = named_outputs(own(*args, **kwargs))
        returned[:] = [name for name, _ in outputs]
        return [tensor for _, tensor in outputs]

    batch = torch.export.Dim("batch", min=1)
    places = [inspect.Parameter(f"input_{i}", inspect.Parameter.POSITIONAL_ONLY) for i in range(len(names))]
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    try:
        exporter.setLevel(logging.ERROR)
        with (
            warnings.catch_warnings(),
            torch.no_grad(),
            forward_replaced(network, forward, inspect.Signature(places)),
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
            raise ValueError(
                f"The forward of {type(network).__name__} works for one number of samples only, as with len(x) or a "
                "size that is turned into a number: use x.shape[0], or x.flatten(1)."
            )
    _name(graph, names, returned)
    return program.model


def _name(graph: ir.Graph, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Name what goes in and out; what has one of these names by chance gets another."""
    wanted: dict[ir.Value, str] = {}
    taken: set[str] = set()
    for value, name in (*zip(graph.inputs, inputs, strict=True), *zip(graph.outputs, outputs, strict=True)):
        name = f"output.{name}" if name in taken else name
        # Keys may have dots in them.
        more = (f"{name}.{number}" for number in itertools.count(2))
        wanted[value] = next(n for n in itertools.chain([name], more) if n not in taken)
        taken.add(wanted[value])
    made = (value for node in graph for value in node.outputs)
    for number, value in enumerate((*graph.initializers.values(), *made)):
        if value.name in taken and value not in wanted:
            value.name = f"{value.name}.inner.{number}"
    for value, name in wanted.items():
        value.name = name
