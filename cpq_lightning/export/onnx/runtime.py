"""An ONNX file in ONNX Runtime, for verification and latency measurement."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from cpq_lightning.export.onnx.graph import Editor, known, layer_of, only_user
from cpq_lightning.export.onnx.integer import SHIFT
from cpq_lightning.export.onnx.layout import LAST
from cpq_lightning.export.onnx.norms import NORM
from cpq_lightning.export.onnx.pairs import cut_off, products
from cpq_lightning.export.onnx.store import stored_codes, use_unsigned_bytes
from cpq_lightning.export.onnx.trace import SHAPE
from cpq_lightning.export.samples import Samples
from cpq_lightning.export.verify import Artefact, Place


def session(model: bytes, threads: int | None = None) -> onnxruntime.InferenceSession:
    """A session on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def seconds(one: onnxruntime.InferenceSession, inputs: Mapping[str, Any]) -> float:
    """Median time of three runs, in seconds, without interference of other sessions and with a warm cache.

    A pause of 0.1 s and one warm-up run come first.
    """
    # After a run, the threads of a session spin for tens of milliseconds and would take time from this session.
    time.sleep(0.1)
    one.run(None, inputs)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        one.run(None, inputs)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class OnnxArtefact:
    """An ONNX file, run by ONNX Runtime on the CPU."""

    runtime = f"ONNX Runtime {onnxruntime.__version__}, CPU"
    # The kernels of ONNX Runtime sum in another order, and approximate exponentials.
    tolerance = 1e-3

    def __init__(self, file: Path | bytes) -> None:
        model = file if isinstance(file, bytes) else file.read_bytes()
        self._model = model
        self._session = session(model)
        self._graph = _read(model).graph
        self._instrumented: dict[bool, _InstrumentedGraph] = {}

    def weight_codes(self) -> dict[str, Tensor]:
        codes_by_layer = {}
        for layer, (codes, dequantize) in stored_codes(self._graph).items():
            codes = codes >> int(dequantize.metadata_props.get(SHIFT, "0"))
            shape = json.loads(dequantize.metadata_props.get(SHAPE, "null"))
            codes_by_layer[layer] = torch.from_numpy(codes if shape is None else _as_weight(codes, shape))
        return codes_by_layer

    def negated_by(self) -> Mapping[str, str]:
        return {
            str(layer_of(node.inputs[1].producer(), "weight")): node.metadata_props[NORM]
            for node in self._graph
            if NORM in node.metadata_props and node.inputs[1] is not None
        }

    def outputs(self, batch: Samples) -> list[Tensor]:
        names = [i.name for i in self._session.get_inputs()]
        inputs = {name: tensor.numpy() for name, tensor in zip(names, batch.inputs, strict=True)}
        return [torch.from_numpy(np.asarray(o)) for o in self._session.run(None, inputs)]

    def codes(self, batch: Samples, given: Mapping[Place, Tensor]) -> tuple[dict[Place, Tensor], list[Tensor]]:
        replace = bool(given)
        if replace not in self._instrumented:
            self._instrumented[replace] = _InstrumentedGraph(self._model, replace)
        return self._instrumented[replace].codes(batch, given)

    def remedy(self) -> tuple[str, Artefact] | None:
        layers = {layer_of(product.weight, "weight"): None for product in cut_off(self._graph)}
        if not layers:
            return None
        fault = (
            "Integer products saturate on this processor: without VNNI, ONNX Runtime adds two products of an unsigned "
            "byte and a signed byte in 16 bits, which is too narrow for the products of the layers "
            f"{', '.join(map(repr, layers))}. With those weights stored as unsigned bytes, as this version of "
            "cpq-lightning writes them, the file is correct: export the model again."
        )
        model = _read(self._model)
        use_unsigned_bytes(model)
        return fault, OnnxArtefact(ir.serde.serialize_model(model).SerializeToString())


def _read(model: bytes) -> ir.Model:
    return ir.serde.deserialize_model(onnx.load_from_string(model))


def _as_weight(codes: Any, shape: Sequence[int]) -> Any:
    """Convert a stored matrix of codes to the layer's weight, from the shape (patch, output channels) of a convolution
    as matrix product, or from the transposed weight of a linear layer.
    """
    if len(shape) == 2:
        return np.ascontiguousarray(codes.T)
    out, channels, *kernel = shape
    return np.ascontiguousarray(codes.reshape(*kernel, channels, out).transpose(3, 2, 0, 1))


class _InstrumentedGraph:
    """The graph with the codes of each input quantizer as further outputs and, optionally, the quantizers' inputs as
    further inputs.

    Everything runs in one session, so that ONNX Runtime fuses the same nodes around the quantizers as in the file.

    Args:
        model: The content of the file.
        replace: Whether given values replace the inputs of all quantizers.
    """

    def __init__(self, model: bytes, replace: bool) -> None:
        with_shapes = onnx.shape_inference.infer_shapes(onnx.load_from_string(model))
        graph_model = ir.serde.deserialize_model(with_shapes)
        graph = graph_model.graph
        edit = Editor(graph)
        self._inputs = [str(i.name) for i in graph.inputs]
        # By name of an added input: its rank, its place, and whether the value is channels last.
        self._ranks: dict[str, int] = {}
        self._given: dict[str, tuple[Place, bool]] = {}
        # By place: name of the output with the codes, zero point, and whether the codes are channels last.
        self._places: dict[Place, tuple[str, int, bool]] = {}
        # The original value by the added input that replaces it.
        originals: dict[ir.Value, ir.Value] = {}
        self._outputs = [str(o.name) for o in graph.outputs]
        for place, quantize in quantized_inputs(graph).items():
            if replace:
                self._add_input(graph, quantize, place, originals)
            self._add_output(graph, edit, quantize, place, originals)
        graph_model.graph.sort()
        self._session = session(ir.serde.serialize_model(graph_model).SerializeToString())

    def _add_input(self, graph: ir.Graph, quantize: ir.Node, place: Place, originals: dict[ir.Value, ir.Value]) -> None:
        """Replace the input of a quantizer by a new input of the graph, for all users of the value."""
        source = quantize.inputs[0]
        assert source is not None
        if source in originals:
            return
        name = f"given/{place[0]}/{place[1]}"
        shape = ir.Shape([None] * _rank(source))
        given = ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
        graph.inputs.append(given)
        uses = list(source.uses())
        for use in uses:
            use.node.replace_input_with(use.idx, given)
        if len(uses) > 1 and not source.is_graph_output():
            # In the file, the value has several users. A second user prevents fusions that the file does not have.
            graph.outputs.append(source)
        originals[given] = source
        self._given[name] = (place, LAST in quantize.metadata_props)
        self._ranks[name] = _rank(source)

    def _add_output(
        self, graph: ir.Graph, edit: Editor, quantize: ir.Node, place: Place, originals: Mapping[ir.Value, ir.Value]
    ) -> None:
        """Add an output with the codes of the original value at a quantizer."""
        source = quantize.inputs[0]
        assert source is not None
        codes = edit.node(quantize, "QuantizeLinear", [originals.get(source, source), *quantize.inputs[1:]])
        clip = only_user(quantize.outputs[0])
        if clip is not None and clip.op_type == "Clip":
            codes = edit.node(quantize, "Clip", [codes, *clip.inputs[1:]])
        codes.name = f"codes/{place[0]}/{place[1]}"
        codes.type = ir.TensorType(ir.DataType.UINT8)
        graph.outputs.append(codes)
        self._places[place] = (codes.name, int(known(quantize.inputs[2])), LAST in quantize.metadata_props)

    def codes(self, batch: Samples, given: Mapping[Place, Tensor]) -> tuple[dict[Place, Tensor], list[Tensor]]:
        inputs = {name: tensor.numpy() for name, tensor in zip(self._inputs, batch.inputs, strict=True)}
        for name, (place, last) in self._given.items():
            inputs[name] = _as_input(given[place], self._ranks[name], last)
        needed = {i.name for i in self._session.get_inputs()}
        names = [name for name, _, _ in self._places.values()]
        results = self._session.run([*names, *self._outputs], {k: v for k, v in inputs.items() if k in needed})
        return self._levels(results[: len(names)]), [torch.from_numpy(np.asarray(o)) for o in results[len(names) :]]

    def _levels(self, all_codes: Sequence[Any]) -> dict[Place, Tensor]:
        levels = {}
        for (place, (_, zero, last)), codes in zip(self._places.items(), all_codes, strict=True):
            tensor = torch.from_numpy(np.asarray(codes)).short() - zero
            levels[place] = tensor.permute(0, 3, 1, 2).contiguous() if last else tensor
        return levels


def quantized_inputs(graph: ir.Graph) -> dict[Place, ir.Node]:
    """The quantizers of the inputs of all products, by layer and call, in the order of the graph.

    A product with a layer's weight has the name of that layer, and not that of the quantizer: exporters merge equal
    quantizers, so a quantizer may be named after another layer. The operands of a product without a weight have the
    names of their quantizers.
    """
    counts: dict[str, int] = {}
    quantizers: dict[Place, ir.Node] = {}
    for product in products(graph):
        named: list[tuple[str | None, ir.Node | None]] = []
        if product.weight is not None:
            named = [(layer_of(product.weight, "weight"), product.first)]
        elif product.second is not None:
            named = [(layer_of(q, "input"), q) for q in (product.first, product.second) if q is not None]
        for name, quantize in named:
            place = (str(name), counts.get(str(name), 0))
            counts[place[0]] = place[1] + 1
            if quantize is not None:
                quantizers[place] = quantize
    return quantizers


def _rank(value: ir.Value) -> int:
    assert value.shape is not None, f"{value.name} has no known shape"
    return len(value.shape)


def _as_input(x: Tensor, rank: int, last: bool) -> Any:
    # In the graph, an input row of a linear layer is a matrix with one row.
    x = x.unsqueeze(1) if x.dim() == 2 and rank == 3 else x
    return (x.permute(0, 2, 3, 1).contiguous() if last else x).numpy()
