"""An ONNX file in ONNX Runtime: to be verified, and to be timed."""

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


def seconds(one: onnxruntime.InferenceSession, inputs: Mapping[str, Any], runs: int = 3) -> float:
    """Median time of a run as if the session were alone: the threads of others at rest, its own weights at hand."""
    # The threads of a session that has run wait for work awake for some tens of milliseconds, on the same cores.
    time.sleep(0.1)
    one.run(None, inputs)
    taken = []
    for _ in range(runs):
        begun = time.perf_counter()
        one.run(None, inputs)
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


class OnnxArtefact:
    """An ONNX file, run by ONNX Runtime on the CPU."""

    runtime = f"ONNX Runtime {onnxruntime.__version__}, CPU"
    # Its kernels add up in another order, and approximate exponentials.
    tolerance = 1e-3

    def __init__(self, file: Path | bytes) -> None:
        model = file if isinstance(file, bytes) else file.read_bytes()
        self._model = model
        self._session = session(model)
        self._graph = _read(model).graph
        self._cuts: dict[bool, _Cut] = {}

    def weight_codes(self) -> dict[str, Tensor]:
        found = {}
        for layer, (codes, decode) in stored_codes(self._graph).items():
            codes = codes >> int(decode.metadata_props.get(SHIFT, "0"))
            shape = json.loads(decode.metadata_props.get(SHAPE, "null"))
            found[layer] = torch.from_numpy(codes if shape is None else _as_weight(codes, shape))
        return found

    def turned_by(self) -> Mapping[str, str]:
        return {
            str(layer_of(node.inputs[1].producer(), "weight")): node.metadata_props[NORM]
            for node in self._graph
            if NORM in node.metadata_props and node.inputs[1] is not None
        }

    def outputs(self, batch: Samples) -> list[Tensor]:
        names = [i.name for i in self._session.get_inputs()]
        fed = {name: tensor.numpy() for name, tensor in zip(names, batch.inputs, strict=True)}
        return [torch.from_numpy(np.asarray(o)) for o in self._session.run(None, fed)]

    def codes(self, batch: Samples, given: Mapping[Place, Tensor]) -> tuple[dict[Place, Tensor], list[Tensor]]:
        feed = bool(given)
        if feed not in self._cuts:
            self._cuts[feed] = _Cut(self._model, feed)
        return self._cuts[feed].codes(batch, given)

    def remedy(self) -> tuple[str, Artefact] | None:
        layers = {layer_of(product.weight, "weight"): None for product in cut_off(self._graph)}
        if not layers:
            return None
        fault = (
            "Integer products saturate on this processor: without VNNI, ONNX Runtime adds two products of an unsigned "
            "byte and a signed one in 16 bits, which do not hold those of the layers "
            f"{', '.join(map(repr, layers))}. With those weights stored as unsigned bytes, as cpq-lightning now writes "
            "them, the file is right: export the model again."
        )
        model = _read(self._model)
        use_unsigned_bytes(model)
        return fault, OnnxArtefact(ir.serde.serialize_model(model).SerializeToString())


def _read(model: bytes) -> ir.Model:
    return ir.serde.deserialize_model(onnx.load_from_string(model))


def _as_weight(codes: Any, shape: Sequence[int]) -> Any:
    """A matrix of patches times channels, or a transposed linear weight, as the layer's own weight."""
    if len(shape) == 2:
        return np.ascontiguousarray(codes.T)
    out, channels, *kernel = shape
    return np.ascontiguousarray(codes.reshape(*kernel, channels, out).transpose(3, 2, 0, 1))


def _with_shapes(model: bytes) -> ir.Model:
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(onnx.load_from_string(model)))


class _Cut:
    """The graph cut at each input quantizer: what arrives is quantized and returned, what goes on is given.

    In one session, so that ONNX Runtime fuses around the quantizers what it fuses in the whole graph.

    Args:
        model: The file's content.
        feed: Whether to cut; otherwise what arrives goes on.
    """

    def __init__(self, model: bytes, feed: bool) -> None:
        whole = _with_shapes(model)
        graph = whole.graph
        edit = Editor(graph)
        self._inputs = [str(i.name) for i in graph.inputs]
        # Of each given input the place whose value it takes; of each place its output and zero point; and whether
        # their channels come last.
        self._ranks: dict[str, int] = {}
        self._given: dict[str, tuple[Place, bool]] = {}
        self._places: dict[Place, tuple[str, int, bool]] = {}
        arrived: dict[ir.Value, ir.Value] = {}
        self._outputs = [str(o.name) for o in graph.outputs]
        for place, quantize in quantized_inputs(graph).items():
            if feed:
                self._feed(graph, quantize, place, arrived)
            self._watch(graph, edit, quantize, place, arrived)
        whole.graph.sort()
        self._session = session(ir.serde.serialize_model(whole).SerializeToString())

    def _feed(self, graph: ir.Graph, quantize: ir.Node, place: Place, arrived: dict[ir.Value, ir.Value]) -> None:
        """Let a value be given to what reads it; ``arrived`` knows what it was, by what is given."""
        source = quantize.inputs[0]
        assert source is not None
        if source in arrived:
            return
        name = f"given/{place[0]}/{place[1]}"
        shape = ir.Shape([None] * _rank(source))
        given = ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
        graph.inputs.append(given)
        uses = list(source.uses())
        for use in uses:
            use.node.replace_input_with(use.idx, given)
        if len(uses) > 1 and not source.is_graph_output():
            # It was not the quantizer's alone, and must not become so, or other things are fused than in the file.
            graph.outputs.append(source)
        arrived[given] = source
        self._given[name] = (place, LAST in quantize.metadata_props)
        self._ranks[name] = _rank(source)

    def _watch(
        self, graph: ir.Graph, edit: Editor, quantize: ir.Node, place: Place, arrived: Mapping[ir.Value, ir.Value]
    ) -> None:
        """Return the codes of what arrives at a quantizer."""
        source = quantize.inputs[0]
        assert source is not None
        codes = edit.node(quantize, "QuantizeLinear", [arrived.get(source, source), *quantize.inputs[1:]])
        clip = only_user(quantize.outputs[0])
        if clip is not None and clip.op_type == "Clip":
            codes = edit.node(quantize, "Clip", [codes, *clip.inputs[1:]])
        codes.name = f"codes/{place[0]}/{place[1]}"
        codes.type = ir.TensorType(ir.DataType.UINT8)
        graph.outputs.append(codes)
        self._places[place] = (codes.name, int(known(quantize.inputs[2])), LAST in quantize.metadata_props)

    def codes(self, batch: Samples, given: Mapping[Place, Tensor]) -> tuple[dict[Place, Tensor], list[Tensor]]:
        fed = {name: tensor.numpy() for name, tensor in zip(self._inputs, batch.inputs, strict=True)}
        for name, (place, last) in self._given.items():
            fed[name] = _as_fed(given[place], self._ranks[name], last)
        needed = {i.name for i in self._session.get_inputs()}
        names = [name for name, _, _ in self._places.values()]
        found = self._session.run([*names, *self._outputs], {k: v for k, v in fed.items() if k in needed})
        return self._levels(found[: len(names)]), [torch.from_numpy(np.asarray(o)) for o in found[len(names) :]]

    def _levels(self, found: Sequence[Any]) -> dict[Place, Tensor]:
        levels = {}
        for (place, (_, zero, last)), codes in zip(self._places.items(), found, strict=True):
            tensor = torch.from_numpy(np.asarray(codes)).short() - zero
            levels[place] = _to_first(tensor) if last else tensor
        return levels


def quantized_inputs(graph: ir.Graph) -> dict[Place, ir.Node]:
    """Which quantizer each product with a layer's weight gets its input from, in the order of the graph, and those of
    both sides of products without a weight.

    Exporters merge quantizers that do the same, so the name that one has may be another layer's.
    """
    counts: dict[str, int] = {}
    found: dict[Place, ir.Node] = {}
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
                found[place] = quantize
    return found


def _rank(value: ir.Value) -> int:
    assert value.shape is not None, f"{value.name} has no known shape"
    return len(value.shape)


def _as_fed(x: Tensor, rank: int, last: bool) -> Any:
    # A linear layer's rows are matrices of one row in the graph.
    x = x.unsqueeze(1) if x.dim() == 2 and rank == 3 else x
    return (x.permute(0, 2, 3, 1).contiguous() if last else x).numpy()


def _to_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2).contiguous()
