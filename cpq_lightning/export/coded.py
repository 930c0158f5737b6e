"""The trained model as an artefact holds it: weights as integer codes, each with its step, and activation grids."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from cpq_lightning.attach import (
    QuantizedLayer,
    avoid_fused_paths,
    call_projections,
    detach,
    is_attached,
    modules_with_products,
    operand_names,
    operand_path,
    quantize_products,
    quantized_layers,
    quantized_operands,
    renew_rewritten,
    unwrapped,
)
from cpq_lightning.export.levels import weight_codes
from cpq_lightning.functional import along_channels
from cpq_lightning.nn import Quantizer, is_sharded


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


class CodedLayer(nn.Module):
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


def evaluated(model: nn.Module) -> nn.Module:
    """A copy of an attached model as it evaluates on a CPU in float32: what an artefact has to equal.

    Raises:
        ValueError: the model is not quantized, its quantization has not begun or lacks ranges, or its weights are
            spread over processes.
    """
    model = unwrapped(model)
    check_exportable(model)
    copied = copy.deepcopy(model).cpu().float().eval()
    for module in copied.modules():
        # Compiled code of the original's.
        module._compiled_call_impl = None  # type: ignore[assignment]
    return copied


def coded(
    model: nn.Module, layer_class: type[CodedLayer] = CodedLayer, grid_class: type[InputGrid] = InputGrid
) -> nn.Module:
    """A copy of an attached model in evaluation, of plain layers that hold their weights as codes.

    Args:
        model: An attached model.
        layer_class: What computes with the codes.
        grid_class: What quantizes inputs.

    Raises:
        ValueError: as :func:`evaluated`.
    """
    copied = evaluated(model)
    parts = {name: _parts(layer, grid_class) for name, layer in quantized_layers(copied)}
    products = [(name, m.product_plan, m.product_counts) for name, m in modules_with_products(copied)]
    grids = {name: _grid(quantizer, grid_class) for name, quantizer in quantized_operands(copied)}
    detach(copied)
    call_projections(copied)
    for name, plan, counts in products:
        own = {operand: grids[operand_path(name, operand)] for operand in operand_names(plan)}
        quantize_products(copied.get_submodule(name), plan, counts, own, "input_grid")
    for name, (codes, step, channel_dim, grid) in parts.items():
        layer = copied.get_submodule(name)
        del layer._parameters["weight"]
        base = type(layer)
        layer.__class__ = type(f"Coded{base.__name__}", (layer_class, base), {"base_class": base})
        assert isinstance(layer, CodedLayer)
        layer.channel_dim = channel_dim
        layer.register_buffer("weight_codes", codes)
        layer.register_buffer("weight_step", step)
        layer.add_module("input_grid", grid)
    avoid_fused_paths(copied, CodedLayer)
    return copied


def _parts(layer: QuantizedLayer, grid_class: type[InputGrid]) -> tuple[Tensor, Tensor, int, InputGrid | None]:
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    step = weights.grid()[0].detach().clone()
    return weight_codes(layer).to(torch.int8), step, weights.channel_dim, _grid(inputs, grid_class)


def _grid(quantizer: Quantizer | None, grid_class: type[InputGrid]) -> InputGrid | None:
    return None if quantizer is None or not quantizer.fitted else grid_class(*grid_of(quantizer))


def grid_of(quantizer: Quantizer) -> tuple[Tensor, int, int]:
    """Step, lowest and highest level of an activation quantizer in evaluation."""
    step, low, high = quantizer.grid()
    return step.detach().clone(), int(low.min()), int(high.max())


def coded_layers(model: nn.Module) -> Iterator[tuple[str, CodedLayer]]:
    """The layers of :func:`coded` with their names, in registration order."""
    for name, module in model.named_modules():
        if isinstance(module, CodedLayer):
            yield name, module


def canonical_names(network: nn.Module) -> dict[str, str]:
    """Names in the ``state_dict`` of a module that is registered several times, each with the first one for it."""
    first: dict[nn.Module, str] = {}
    names = {}
    for name, module in network.named_modules(remove_duplicate=False):
        own = first.setdefault(module, name)
        if own != name:
            names |= {f"{name}.{key}": f"{own}.{key}" for key in (*module._parameters, *module._buffers)}
    return names


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
    renew_rewritten(model)
    unknown = uncalled(model)
    if unknown and len(unknown) == sum(1 for _ in quantized_inputs(model)):
        raise ValueError("The ranges of activations are not known: call calibrate(model, batches), or train, first.")


def uncalled(model: nn.Module) -> list[str]:
    """Names of the layers whose input no forward has quantized (only their weight is read), and of such operands."""
    return [name for name, _, quantizer in quantized_inputs(model) if not quantizer.fitted]


def quantized_inputs(model: nn.Module) -> Iterator[tuple[str, nn.Module, Quantizer]]:
    """Whatever quantizes its input in an attached model: layers, and operands of products without a weight."""
    for name, layer in quantized_layers(model):
        if layer.input_quantizer is not None:
            yield name, cast(nn.Module, layer), layer.input_quantizer
    for name, quantizer in quantized_operands(model):
        yield name, model.get_submodule(name), quantizer
