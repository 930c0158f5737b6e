"""The trained model as an artefact holds it: weights as integer codes, each with its step, and activation grids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpq_lightning.attach.attach import detach
from cpq_lightning.attach.first_forward import is_training
from cpq_lightning.attach.layers import QuantizedLayer, is_attached, quantized_layers, read_layers
from cpq_lightning.attach.origin import late_layers, late_message
from cpq_lightning.attach.parametrized import copied, leave_computed
from cpq_lightning.attach.products import (
    modules_with_products,
    operand_names,
    operand_path,
    quantize_products,
    quantized_operands,
)
from cpq_lightning.attach.range_tracking import refit_rewritten, rewritten_weights
from cpq_lightning.attach.tied import source_of, tied_readers
from cpq_lightning.attach.timm_layers import call_projections
from cpq_lightning.attach.weight_readers import avoid_fused_paths
from cpq_lightning.attach.wrapping import unwrapped
from cpq_lightning.functional.grid import along_channels
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.nn.sharding import is_sharded
from cpq_lightning.report.levels import weight_codes


class InputGrid(nn.Module):
    """Quantizes a layer's input as it evaluates: ``clip(round(x / step), low, high) · step``, ties to even.

    Args:
        step: Distance between levels, shape (1,), in the unit of the input.
        low: Lowest level.
        high: Highest level.
    """

    step: Tensor

    def __init__(self, step: Tensor, low: int, high: int) -> None:
        super().__init__()
        self.register_buffer("step", step)
        self.low, self.high = low, high

    def codes(self, x: Tensor) -> Tensor:
        """The levels of ``x``, as floats."""
        return torch.clamp(torch.round(x / self.step), self.low, self.high)

    def forward(self, x: Tensor) -> Tensor:
        return self.codes(x) * self.step

    def extra_repr(self) -> str:
        return f"levels {self.low} to {self.high}"


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input that a layer is called with."""
    return args[0] if args else kwargs["input"]


def with_input(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a layer's call with another input."""
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "input": x})


class IntegerLayer(nn.Module):
    """Mixed in before a layer's own class, whose ``weight`` is computed from codes in each forward."""

    base_class: ClassVar[type[nn.Module]]
    weight_codes: Tensor
    weight_step: Tensor
    input_grid: InputGrid | None
    channel_dim: int

    @property
    def weight(self) -> Tensor:
        """``codes · step``."""
        return self.weight_codes.float() * along_channels(self.weight_step, self.weight_codes.dim(), self.channel_dim)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.input_grid is not None:
            input = self.input_grid(input)
        return super().forward(input, *args, **kwargs)


class CodedTable(nn.Module):
    """Mixed in before the class of a module that is tied to a layer: its Parameter is computed from the layer's codes.

    The Parameter's name is a property of the class that is made for the module.
    """

    base_class: ClassVar[type[nn.Module]]
    weight_codes: Tensor
    weight_step: Tensor
    channel_dim: int
    # The layer's name.
    source: str

    def decoded(self) -> Tensor:
        """``codes · step``."""
        return self.weight_codes.float() * along_channels(self.weight_step, self.weight_codes.dim(), self.channel_dim)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.base_class.forward is not nn.Embedding.forward or self.channel_dim != 0:
            return super().forward(*args, **kwargs)
        # The codes that are asked for, rather than the whole table in floats.
        return self.look_up(input_of(args, kwargs))

    def look_up(self, index: Tensor) -> Tensor:
        """Rows of :meth:`decoded`."""
        step = self.weight_step if len(self.weight_step) == 1 else F.embedding(index, self.weight_step[:, None])
        return F.embedding(index, self.weight_codes).float() * step


def evaluated(model: nn.Module) -> nn.Module:
    """A copy of an attached model as it evaluates on a CPU in float32: what an artefact has to equal.

    Raises:
        ValueError: the model is not quantized, its quantization has not begun or lacks ranges, layers have come or
            weights were rewritten behind it, or its weights are spread over processes.
    """
    model = unwrapped(model)
    check_exportable(model)
    own = copied(model).cpu().float().eval()
    for module in own.modules():
        # Compiled code of the original's.
        module._compiled_call_impl = None  # type: ignore[assignment]
    with torch.no_grad():
        for _, layer in quantized_layers(own):
            # Computed once: where memory lies otherwise, a norm is rounded otherwise.
            leave_computed(layer)
    return own


def coded(
    model: nn.Module,
    layer_class: type[IntegerLayer] = IntegerLayer,
    grid_class: type[InputGrid] = InputGrid,
    table_class: type[CodedTable] = CodedTable,
) -> nn.Module:
    """A copy of an attached model in evaluation, of plain layers that hold their weights as codes; those that the
    forward goes round, and reads in full precision, stay so.

    Layers that share a weight, and modules that are tied to one, hold the same tensor.

    Args:
        model: An attached model.
        layer_class: What computes with the codes.
        grid_class: What quantizes inputs.
        table_class: What computes with the codes of a layer that it is tied to.

    Raises:
        ValueError: as :func:`evaluated`.
    """
    network = evaluated(model)
    known: dict[int, tuple[Tensor, Tensor]] = {}
    parts = {name: _parts(layer, grid_class, known) for name, layer in read_layers(network)}
    tied = [(name, reader.tied_name, source_of(reader, network)) for name, reader in tied_readers(network)]
    products = [(name, m.product_plan, m.product_counts) for name, m in modules_with_products(network)]
    grids = {name: _grid(quantizer, grid_class) for name, quantizer in quantized_operands(network)}
    detach(network)
    call_projections(network)
    for name, plan, counts in products:
        own = {operand: grids[operand_path(name, operand)] for operand in operand_names(plan)}
        quantize_products(network.get_submodule(name), plan, counts, own, "input_grid")
    for name, (codes, step, channel_dim, grid) in parts.items():
        layer = network.get_submodule(name)
        del layer._parameters["weight"]
        base = type(layer)
        layer.__class__ = type(f"Coded{base.__name__}", (layer_class, base), {"base_class": base})
        assert isinstance(layer, IntegerLayer)
        layer.channel_dim = channel_dim
        layer.register_buffer("weight_codes", codes)
        layer.register_buffer("weight_step", step)
        layer.add_module("input_grid", grid)
    for name, parameter, source in tied:
        if source is not None and source in parts:
            _make_table(network.get_submodule(name), parameter, source, parts[source], table_class)
    avoid_fused_paths(network, IntegerLayer)
    return network


_Parts = tuple[Tensor, Tensor, int, InputGrid | None]


def _parts(layer: QuantizedLayer, grid_class: type[InputGrid], known: dict[int, tuple[Tensor, Tensor]]) -> _Parts:
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    if layer.weight_id not in known:
        known[layer.weight_id] = weight_codes(layer).to(torch.int8), weights.grid()[0].detach().clone()
    return *known[layer.weight_id], weights.channel_dim, _grid(inputs, grid_class)


def _make_table(module: nn.Module, parameter: str, source: str, parts: _Parts, table_class: type[CodedTable]) -> None:
    del module._parameters[parameter]
    base = type(module)
    content = {"base_class": base, parameter: property(lambda self: self.decoded())}
    module.__class__ = type(f"Coded{base.__name__}", (table_class, base), content)
    assert isinstance(module, CodedTable)
    module.register_buffer("weight_codes", parts[0])
    module.register_buffer("weight_step", parts[1])
    module.channel_dim, module.source = parts[2], source


def _grid(quantizer: Quantizer | None, grid_class: type[InputGrid]) -> InputGrid | None:
    return None if quantizer is None or not quantizer.fitted else grid_class(*grid_of(quantizer))


def grid_of(quantizer: Quantizer) -> tuple[Tensor, int, int]:
    """Step, lowest and highest level of an activation quantizer in evaluation."""
    step, low, high = quantizer.grid()
    return step.detach().clone(), int(low.min()), int(high.max())


def coded_layers(model: nn.Module) -> Iterator[tuple[str, IntegerLayer]]:
    """The layers of :func:`coded` with their names, in registration order."""
    for name, module in model.named_modules():
        if isinstance(module, IntegerLayer):
            yield name, module


def coded_tables(model: nn.Module) -> Iterator[tuple[str, CodedTable]]:
    """The modules of :func:`coded` that are tied to a layer, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, CodedTable):
            yield name, module


def check_exportable(model: nn.Module) -> None:
    """Refuse a model that cannot be exported, without reading what other processes hold.

    Raises:
        ValueError: see :func:`evaluated`.
    """
    if not is_attached(model):
        raise ValueError(
            f"The model {type(model).__name__} is not quantized: expected one that attach(model, config) or "
            "CPQCallback has quantized, and that was trained since."
        )
    if late := late_layers(model):
        raise ValueError(late_message(model, late))
    layers = dict(quantized_layers(model))
    for name, layer in layers.items():
        if is_sharded(layer.weight):
            raise ValueError(
                f"The weight of layer {name!r} is spread over processes: load a checkpoint of the run in one process "
                "and export that."
            )
        if not layer.weight_quantizer.active:
            raise ValueError(
                f"Quantization has not begun in layer {name!r}: the model is in full precision still. Export it "
                "behind the step that quantize_from names."
            )
        layer.fit_if_needed()
    stale = rewritten_weights(model)
    if stale and not is_training(model):
        raise ValueError(
            f"The weights of {len(stale)} layers have been rewritten behind the ranges that were fitted to them: "
            f"{', '.join(stale)}. Their grids have four times the error of fresh ones, or more. Call "
            "calibrate(model, batches), which fits weights and inputs anew; or, where inputs are what they were, "
            "cpq_lightning.attach.refit_rewritten(model), which fits these weights alone."
        )
    if stale:
        # What the next step of training would have done.
        refit_rewritten(model)
    unknown = uncalled(model)
    if unknown and len(unknown) == sum(1 for _ in quantized_inputs(model)):
        raise ValueError("The ranges of activations are not known: call calibrate(model, batches), or train, first.")


def uncalled(model: nn.Module) -> list[str]:
    """Names of the layers whose input no forward has quantized (only their weight is read), and of such operands."""
    return [name for name, _, quantizer in quantized_inputs(model) if not quantizer.fitted]


def quantized_inputs(model: nn.Module) -> Iterator[tuple[str, nn.Module, Quantizer]]:
    """Whatever quantizes its input in an attached model: layers, and operands of products without a weight."""
    for name, layer in read_layers(model):
        if layer.input_quantizer is not None:
            yield name, cast(nn.Module, layer), layer.input_quantizer
    for name, quantizer in quantized_operands(model):
        yield name, model.get_submodule(name), quantizer
