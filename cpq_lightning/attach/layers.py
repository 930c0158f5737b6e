"""Switch one layer, in place, to a subclass of its class whose forward multiplies by the quantized weight.

``weight`` keeps its meaning: the Parameter, or the tensor that a parametrization or a pruning mask computes from one.
Code that writes to ``weight`` changes what is quantized; ``isinstance`` and the names in ``state_dict`` stay valid.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from cpq_lightning.attach.class_switch import Switched, switch_class, switch_class_back
from cpq_lightning.attach.decomposed import ParameterLayer
from cpq_lightning.attach.parametrized import leave_computed, weight_now
from cpq_lightning.attach.weight_readers import ReadQuantized, TiedReader, make_dense, restore_sparse
from cpq_lightning.attach.wrapping import unwrapped
from cpq_lightning.kernels.product import Convolution, Operand, product
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.nn.sharding import View, full_tensor, is_sharded, whole, write_part
from cpq_lightning.nn.watch import watchers


class QuantizedLayer(Switched):
    """Mixin that :func:`switch` puts before the class of a layer."""

    weight: Tensor
    weight_quantizer: Quantizer
    input_quantizer: Quantizer | None

    def read_weight(self) -> Tensor:
        """The current weight; reading it does not advance a parametrization that updates itself in training."""
        return weight_now(self)

    @property
    def weight_id(self) -> int:
        """Equal for layers that share both the Parameter and its quantizer."""
        parameter = self._parameters.get("weight")
        return hash((id(self if parameter is None else parameter), id(self.weight_quantizer)))

    def fit_if_needed(self) -> None:
        """Fit the weight's scale if full-precision weights were loaded since the last fit."""
        if not self.weight_quantizer.fitted:
            self.weight_quantizer.fit_weight(self.read_weight())

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        for watcher in watchers():
            watcher.on_layer(self)
        stock = None if args or kwargs else _stock_class(self)
        if self.input_quantizer is not None:
            if stock is not None and type(input) is Tensor and _is_plain_product(self, stock, input):
                return self._product(input, self.input_quantizer)
            input = self.input_quantizer(input)
        weight = self.weight
        if stock is not None and not is_sharded(weight):
            return self._multiply(input, self.weight_quantizer(weight), self.bias)
        if "parametrizations" not in self._modules:
            return self._base_forward(input, *args, **kwargs)
        # Cached, because a parametrization computes a new tensor each time that the forward reads the weight.
        with parametrize.cached():
            return self._base_forward(input, *args, **kwargs)

    def prepared(self) -> Callable[[Tensor], Tensor]:
        """The forward of a linear layer for a loop: the weight is quantized now, and inputs in each call.

        A layer with hooks is called as a module instead.
        """
        if self._forward_pre_hooks or self._forward_hooks or self._backward_hooks or self._backward_pre_hooks:
            return self
        for watcher in watchers():
            watcher.on_layer(self)
        return functools.partial(self._repeated, self.weight_quantizer(self.weight))

    def _repeated(self, weight: Tensor, input: Tensor) -> Tensor:
        quantized = input if self.input_quantizer is None else self.input_quantizer(input)
        return self._multiply(quantized, weight, self.bias)

    def _base_forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The forward of the layer's original class, which reads the weight itself."""
        weight = self.weight
        with ReadQuantized([(weight, self.weight_quantizer)]):
            return super().forward(input, *args, **kwargs)

    def _product(self, input: Tensor, quantizer: Quantizer) -> Tensor:
        """The product of torch's forward; fused kernels keep no quantized tensors for backward."""
        x = quantizer.operand(input)
        tensor = self.weight
        weight = Operand(tensor) if is_sharded(tensor) else self.weight_quantizer.operand(tensor)
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        convolution = None
        if isinstance(self, _ConvNd):
            dimensions = len(self.kernel_size)
            stride, padding, dilation = (
                _per_dimension(v, dimensions) for v in (self.stride, self.padding, self.dilation)
            )
            convolution = Convolution(stride, padding, dilation, self.groups)
        if x.grid is not None or weight.grid is not None:
            watching = watchers()
            if not watching:
                return product(x, weight, bias, convolution)
            # Third-party function modes must not see the operations inside of it.
            with torch._C.DisableTorchFunction():
                out = product(x, weight, bias, convolution)
            for watcher in watching:
                watcher.on_product(self, x.value, weight.value, out)
            return out
        return self._multiply(x.value, weight.value, bias)

    def _multiply(self, input: Tensor, weight: Tensor, bias: Any) -> Tensor:
        """The product of torch's forward, with a given weight."""
        return self._conv_forward(input, weight, bias) if isinstance(self, _ConvNd) else F.linear(input, weight, bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        given = any(key.startswith(prefix) for key in state_dict)
        for name in ("weight_quantizer", "input_quantizer"):
            quantizer = getattr(self, name)
            if quantizer is not None and given and f"{prefix}{name}.state" not in state_dict:
                if quantizer.state.is_meta and not self.weight.is_meta:
                    # Plain weights were assigned to a model on the meta device.
                    quantizer.to_empty(device=self.weight.device)
                # The checkpoint is in full precision: ranges that were fitted to other weights are not valid for it.
                quantizer.reset()


# Attribute in which a layer keeps its ``Origin``: its name, and the config, in the model that was attached.
ORIGIN = "_cpq_origin"
_STOCK = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_stock_classes: dict[type[nn.Module], type[nn.Module] | None] = {}


def _stock_class(layer: QuantizedLayer) -> type[nn.Module] | None:
    """The torch class whose forward a layer runs, which multiplies by ``weight`` and does nothing else; or ``None``."""
    base = layer.base_class
    if base not in _stock_classes:
        matching = (stock for stock in _STOCK if issubclass(base, stock) and base.forward is stock.forward)
        _stock_classes[base] = next(matching, None)
    return None if "forward" in layer.__dict__ else _stock_classes[base]


def _is_plain_product(layer: QuantizedLayer, stock: type[nn.Module], input: Tensor) -> bool:
    """Whether the layer's forward on this input equals :func:`product`."""
    if not input.numel():
        return False
    if isinstance(layer, _ConvNd):
        overridden = "_conv_forward" in layer.__dict__ or layer.base_class._conv_forward is not stock._conv_forward  # type: ignore[attr-defined]
        unpadded = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return not overridden and unpadded and input.dim() == len(layer.kernel_size) + 2
    # For another memory layout, torch sums in another order.
    return input.dim() > 1 and input.is_contiguous()


def _per_dimension(value: Any, dimensions: int) -> tuple[int, ...]:
    """One value for each spatial dimension, from a number or a tuple, as torch's convolutions accept both."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dimensions if len(values) == 1 else values


def switch(layer: nn.Module, weight_quantizer: Quantizer, input_quantizer: Quantizer | None) -> None:
    """Make a layer a quantized layer, in place."""
    switch_class(layer, QuantizedLayer)
    layer.add_module("weight_quantizer", weight_quantizer)
    layer.add_module("input_quantizer", input_quantizer)
    make_dense(layer)


def switch_back(layer: QuantizedLayer, written: bool = True) -> None:
    """Make a quantized layer plain again, in place; ``written`` writes the quantized weight into its Parameter."""
    if written:
        _write(layer)
    for name in ("weight_quantizer", "input_quantizer"):
        layer._modules.pop(name, None)
    layer.__dict__.pop(ORIGIN, None)
    restore_sparse(layer)
    switch_class_back(layer)


@torch.no_grad()
def _write(layer: QuantizedLayer) -> None:
    weight = layer.read_weight()
    value = quantized_weight(layer.weight_quantizer, full_tensor(weight))
    if isinstance(layer, ParameterLayer):
        write_part(leave_computed(layer), layer.part.weight_in, value)
        return
    if isinstance(weight, DTensor):
        value = distribute_tensor(value, weight.device_mesh, weight.placements)
    leave_computed(layer).copy_(value)


@torch.no_grad()
def quantized_weight(quantizer: Quantizer, weight: Tensor) -> Tensor:
    """A weight as its quantizer quantizes it in evaluation."""
    training = quantizer.training
    quantizer.eval()
    try:
        return quantizer(weight)
    finally:
        quantizer.train(training)


def parameter_of(layer: QuantizedLayer) -> tuple[nn.Parameter, View] | None:
    """The Parameter that has a layer's weight, and what gives the weight as a view of it; ``None`` where the weight is
    computed.
    """
    if isinstance(layer, ParameterLayer):
        return None if layer.parameter is None else (layer.parameter, layer.part.weight_in)
    weight = layer._parameters.get("weight")
    return None if weight is None else (weight, whole)


def is_attached(model: nn.Module) -> bool:
    """Whether any layer of the model is quantized."""
    return any(isinstance(module, QuantizedLayer) for module in model.modules())


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """The quantized layers of a model with their names, in registration order."""
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, QuantizedLayer):
            yield name, module


def bypassed(model: nn.Module) -> tuple[set[QuantizedLayer], set[QuantizedLayer]]:
    """Quantized layers that the model's forward bypasses, as far as a recorded forward shows.

    Returns:
        Layers whose weight is not read quantized, and layers whose input no quantizer sees. The out-projection of
        ``nn.MultiheadAttention`` is only in the second set, because its weight is read.
    """
    layers = [layer for _, layer in quantized_layers(model)]
    called = {layer for layer in layers if (layer.input_quantizer or layer.weight_quantizer).execution_index}
    if not called:
        return set(), set()
    inputs = {layer for layer in layers if layer not in called and layer.input_quantizer is not None}
    return {layer for layer in layers if layer not in called and not layer.weight_quantizer.macs}, inputs


def read_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """The quantized layers whose weights the model's forward reads quantized, with their names."""
    not_read, _ = bypassed(model)
    yield from ((name, layer) for name, layer in quantized_layers(model) if layer not in not_read)


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """The quantizers of a model with their names, in registration order.

    A quantizer that a layer shares with a module that is tied to it, such as an embedding, is named after the layer.
    """
    named_quantizers, tied = [], False
    for name, module in unwrapped(model).named_modules():
        tied = tied or isinstance(module, TiedReader)
        if isinstance(module, Quantizer):
            named_quantizers.append((name, module))
    if not tied:
        yield from named_quantizers
        return
    layers = {layer.weight_quantizer for _, layer in quantized_layers(model)}
    seen: set[Quantizer] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, Quantizer) or module in seen:
            continue
        if module in layers and isinstance(model.get_submodule(name.rpartition(".")[0]), TiedReader):
            continue
        seen.add(module)
        yield name, module
