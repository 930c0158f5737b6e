"""The integer model that exports write: layers with integer weight codes and their scales, and grids for the inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpq_lightning.attach.attach import detach
from cpq_lightning.attach.decompose import own_all_weights
from cpq_lightning.attach.first_forward import is_training
from cpq_lightning.attach.layer_callers import call_layers
from cpq_lightning.attach.layers import QuantizedLayer, is_attached, quantized_layers, read_layers
from cpq_lightning.attach.origin import late_layers, late_message
from cpq_lightning.attach.parameter_products import announce
from cpq_lightning.attach.parametrized import copied, leave_computed
from cpq_lightning.attach.products import (
    modules_with_products,
    operand_names,
    operand_path,
    quantize_products,
    quantized_operands,
)
from cpq_lightning.attach.range_tracking import refit_rewritten, rewritten_weights, without_level_zero
from cpq_lightning.attach.tied import source_of, tied_readers
from cpq_lightning.attach.timm_layers import call_projections
from cpq_lightning.attach.weight_readers import avoid_fused_paths
from cpq_lightning.attach.wrapping import unwrapped
from cpq_lightning.errors import ExportError
from cpq_lightning.functional.groups import scale_of_each, spread
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.nn.sharding import is_sharded
from cpq_lightning.report.levels import code_scale, weight_codes


class InputGrid(nn.Module):
    """Fake-quantizes the input of a layer as in evaluation: ``clip(round(x / step), low, high) · step``, ties to even.

    Args:
        step: The scale, shape (1,), in the unit of the input.
        low: Lowest level.
        high: Highest level.
    """

    step: Tensor

    def __init__(self, step: Tensor, low: int, high: int) -> None:
        super().__init__()
        self.register_buffer("step", step)
        self.low, self.high = low, high

    def codes(self, x: Tensor) -> Tensor:
        """The integer levels of ``x``, stored as floats."""
        return torch.clamp(torch.round(x / self.step), self.low, self.high)

    def forward(self, x: Tensor) -> Tensor:
        return self.codes(x) * self.step

    def extra_repr(self) -> str:
        return f"levels {self.low} to {self.high}"


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input in the arguments of a layer's call."""
    return args[0] if args else kwargs["input"]


def with_input(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a layer's call with the input replaced."""
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "input": x})


class _Coded(nn.Module):
    """Mixin in front of a module's class with a weight as integer codes and their scales."""

    base_class: ClassVar[type[nn.Module]]
    weight_codes: Tensor
    weight_step: Tensor
    channel_dim: int
    # Inputs that share a scale; 0 without groups.
    group_size: int

    def dequantized(self) -> Tensor:
        """``codes · step``."""
        codes = self.weight_codes
        return codes.float() * scale_of_each(self.weight_step, codes.shape, self.channel_dim, self.group_size)

    @property
    def steps_of_groups(self) -> Tensor:
        """The scales of a weight with groups, shape (outputs, groups of an output)."""
        return self.weight_step.reshape(len(self.weight_codes), -1)


# Attribute with the weight while it is held.
_HELD = "_cpq_held_weight"


class IntegerLayer(_Coded):
    """Mixin in front of a layer's class that computes ``weight`` from integer codes in each forward."""

    input_grid: InputGrid | None

    @property
    def weight(self) -> Tensor:
        """``codes · step``."""
        held = self.__dict__.get(_HELD)
        return self.dequantized() if held is None else held

    @contextmanager
    def weight_held(self) -> Iterator[None]:
        """Let ``weight`` be the same tensor whenever it is read."""
        self.__dict__[_HELD] = self.weight
        try:
            yield
        finally:
            self.__dict__.pop(_HELD)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.input_grid is not None:
            input = self.input_grid(input)
        return super().forward(input, *args, **kwargs)

    def prepared(self) -> Callable[[Tensor], Tensor]:
        """The forward of a linear layer for a loop, in which the weight is computed once."""
        return functools.partial(self._repeated, self.weight)

    def _repeated(self, weight: Tensor, input: Tensor) -> Tensor:
        return F.linear(input if self.input_grid is None else self.input_grid(input), weight, self.bias)  # type: ignore[arg-type]


class IntegerTable(_Coded):
    """Mixin in front of the class of a module whose Parameter is tied to a layer's weight, such as an embedding.

    The tied Parameter becomes a property of the module's new class, computed from the integer codes of the layer.
    """

    # Name of the layer whose weight the module shares.
    source: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.base_class.forward is not nn.Embedding.forward or self.channel_dim != 0:
            return super().forward(*args, **kwargs)
        # This dequantizes only the rows that are looked up.
        return self.look_up(input_of(args, kwargs))

    def look_up(self, index: Tensor) -> Tensor:
        """Rows of :meth:`dequantized`."""
        step = self.weight_step
        if len(step) > 1:
            step = F.embedding(index, self.steps_of_groups)
        if self.group_size:
            step = spread(step, self.weight_codes.shape[1], self.group_size)
        return F.embedding(index, self.weight_codes).float() * step


def evaluated(model: nn.Module) -> nn.Module:
    """A copy of an attached model in evaluation mode, on the CPU, in float32: the reference for an exported file.

    Raises:
        ValueError: the model is not quantized; its quantization has not begun, or ranges are missing; layers were
            added after attach; weights were rewritten after their ranges were fitted; or its weights are sharded over
            processes.
    """
    model = unwrapped(model)
    check_exportable(model)
    copy = copied(model).cpu().float().eval()
    with torch.no_grad():
        for _, layer in list(quantized_layers(copy)):
            # Parametrized weights are computed once: the rounding of a norm depends on the memory layout.
            leave_computed(layer)
    return copy


def to_integer_model(
    model: nn.Module,
    layer_class: type[IntegerLayer] = IntegerLayer,
    grid_class: type[InputGrid] = InputGrid,
    table_class: type[IntegerTable] = IntegerTable,
) -> nn.Module:
    """The integer model of an attached model: a copy in evaluation mode whose layers store their weights as codes.

    Layers that the forward bypasses keep their weights in full precision, as the forward reads them. Layers that share
    a weight, and modules that are tied to it, share one tensor of codes.

    Args:
        model: An attached model.
        layer_class: Mixin for the quantized layers.
        grid_class: Module that fake-quantizes inputs.
        table_class: Mixin for modules that are tied to a layer.

    Raises:
        ValueError: the model cannot be exported, see :func:`evaluated`.
    """
    network = evaluated(model)
    known: dict[int, tuple[Tensor, Tensor]] = {}
    parts = {name: _parts(layer, grid_class, known) for name, layer in read_layers(network)}
    tied = [(name, reader.tied_name, source_of(reader, network)) for name, reader in tied_readers(network)]
    products = [(name, m.product_plan, m.product_counts) for name, m in modules_with_products(network)]
    grids = {name: _grid(quantizer, grid_class) for name, quantizer in quantized_operands(network)}
    detach(network)
    own_all_weights(network, parts)
    call_projections(network)
    for name, plan, counts in products:
        operands = {operand: grids[operand_path(name, operand)] for operand in operand_names(plan)}
        quantize_products(network.get_submodule(name), plan, counts, operands, "input_grid")
    for name, (codes, step, channel_dim, group_size, grid) in parts.items():
        layer = network.get_submodule(name)
        del layer._parameters["weight"]
        base = type(layer)
        layer.__class__ = type(f"Integer{base.__name__}", (layer_class, base), {"base_class": base})
        assert isinstance(layer, IntegerLayer)
        layer.channel_dim, layer.group_size = channel_dim, group_size
        layer.register_buffer("weight_codes", codes)
        layer.register_buffer("weight_step", step)
        layer.add_module("input_grid", grid)
    for name, parameter, source in tied:
        if source is not None and source in parts:
            module, layer = network.get_submodule(name), network.get_submodule(source)
            _make_table(module, parameter, source, layer, parts[source], table_class)
    call_layers(network, IntegerLayer)
    avoid_fused_paths(network, IntegerLayer)
    return network


_Parts = tuple[Tensor, Tensor, int, int, InputGrid | None]


def _parts(layer: QuantizedLayer, grid_class: type[InputGrid], known: dict[int, tuple[Tensor, Tensor]]) -> _Parts:
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    if layer.weight_id not in known:
        known[layer.weight_id] = weight_codes(layer).to(torch.int8), code_scale(weights).clone()
    return *known[layer.weight_id], weights.channel_dim, weights.settings.group_size, _grid(inputs, grid_class)


def _make_table(
    module: nn.Module, parameter: str, source: str, layer: nn.Module, parts: _Parts, table_class: type[IntegerTable]
) -> None:
    del module._parameters[parameter]
    base = type(module)
    content = {"base_class": base, parameter: property(lambda self: announce(self.dequantized(), layer))}
    module.__class__ = type(f"Integer{base.__name__}", (table_class, base), content)
    assert isinstance(module, IntegerTable)
    module.register_buffer("weight_codes", parts[0])
    module.register_buffer("weight_step", parts[1])
    module.channel_dim, module.group_size, module.source = *parts[2:4], source


def _grid(quantizer: Quantizer | None, grid_class: type[InputGrid]) -> InputGrid | None:
    return None if quantizer is None or not quantizer.fitted else grid_class(*grid_of(quantizer))


def grid_of(quantizer: Quantizer) -> tuple[Tensor, int, int]:
    """Scale, lowest and highest level of an activation quantizer in evaluation."""
    step, low, high = quantizer.grid()
    return step.detach().clone(), int(low.min()), int(high.max())


def integer_layers(model: nn.Module) -> Iterator[tuple[str, IntegerLayer]]:
    """The integer layers of a model of :func:`to_integer_model` with their names, in registration order."""
    for name, module in model.named_modules():
        if isinstance(module, IntegerLayer):
            yield name, module


def integer_tables(model: nn.Module) -> Iterator[tuple[str, IntegerTable]]:
    """The modules of a model of :func:`to_integer_model` that are tied to a layer, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, IntegerTable):
            yield name, module


def check_exportable(model: nn.Module) -> None:
    """Raise an error for a model that cannot be exported, without reading the shards of other processes.

    Raises:
        ExportError: the model cannot be exported, see :func:`evaluated`.
    """
    if not is_attached(model):
        raise ExportError(
            f"The model {type(model).__name__} is not quantized: expected one that attach(model, config) or "
            "CPQCallback has quantized, and that was trained after that."
        )
    if late := late_layers(model):
        raise ExportError(late_message(model, late))
    layers = dict(quantized_layers(model))
    for name, layer in layers.items():
        if is_sharded(layer.weight):
            raise ExportError(
                f"The weight of layer {name!r} is sharded over processes: load a checkpoint of the run in one process "
                "and export that model."
            )
        if not layer.weight_quantizer.active:
            raise ExportError(
                f"Quantization has not begun in layer {name!r}: the model is still in full precision. Export it "
                "after the training step that quantize_from sets."
            )
        layer.fit_if_needed()
    stale = rewritten_weights(model)
    pruned = without_level_zero(model)
    if pruned and not is_training(model):
        raise ExportError(
            f"The weights of {len(pruned)} layers have zeros, as after pruning, and a balanced grid, which has no "
            f"level 0 and makes them half a scale: {', '.join(pruned)}. Call calibrate(model, batches), or "
            "cpq_lightning.attach.refit_rewritten(model), which gives these weights a grid with a level 0; both change "
            "what the model computes, so measure it again."
        )
    if stale and not is_training(model):
        raise ExportError(
            f"The weights of {len(stale)} layers have been rewritten after their ranges were fitted: "
            f"{', '.join(stale)}. Newly fitted grids would have far less error. Call "
            "calibrate(model, batches), which fits the ranges of weights and inputs again; or, if the inputs have not "
            "changed, cpq_lightning.attach.refit_rewritten(model), which fits only the ranges of these weights."
        )
    if stale:
        # The next training step would have fitted these ranges.
        refit_rewritten(model)
    unknown = uncalled(model)
    if unknown and len(unknown) == sum(1 for _ in quantized_inputs(model)):
        raise ExportError("The ranges of activations are not known: call calibrate(model, batches), or train, first.")


def uncalled(model: nn.Module) -> list[str]:
    """Names of the layers, and operands of products, whose quantizer no forward has called; the input has no range.

    Of such a layer the forward only reads the weight.
    """
    return [name for name, _, quantizer in quantized_inputs(model) if not quantizer.fitted]


def quantized_inputs(model: nn.Module) -> Iterator[tuple[str, nn.Module, Quantizer]]:
    """The modules of an attached model that quantize an input: layers, and operands of products without a weight.

    Yields:
        Name, module and quantizer.
    """
    for name, layer in read_layers(model):
        if layer.input_quantizer is not None:
            yield name, cast(nn.Module, layer), layer.input_quantizer
    for name, quantizer in quantized_operands(model):
        yield name, model.get_submodule(name), quantizer
