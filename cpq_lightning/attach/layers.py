"""The surgery on one layer: its class is switched to a subclass whose ``weight`` reads quantized.

Parameters keep their identity and their names in ``state_dict``, ``isinstance`` keeps working, and code that reads
``layer.weight`` without calling the layer gets the quantized weight as well.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.conv import _ConvNd

from cpq_lightning.attach.switching import Switched, switch_class, switch_class_back
from cpq_lightning.kernels import Convolution, Operand, product
from cpq_lightning.nn import Quantizer, is_sharded, whole


class QuantizedLayer(Switched):
    """Mixed in before a layer's own class by :func:`switch`."""

    weight_quantizer: Quantizer
    input_quantizer: Quantizer | None

    @property
    def weight(self) -> Tensor:
        """The quantized weight. The full-precision Parameter is :meth:`full_precision_weight`."""
        weight = self._parameters["weight"]
        # Outside of a forward FSDP2 reads, through this property, the Parameter that it has sharded.
        return weight if is_sharded(weight) else self.weight_quantizer(weight)  # type: ignore[return-value]

    def full_precision_weight(self) -> nn.Parameter:
        """The Parameter that the optimizer updates."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    def fit_if_needed(self) -> None:
        """Fit the weight's step where full-precision weights were loaded over what it was fitted to."""
        if not self.weight_quantizer.calibrated:
            self.weight_quantizer.fit_weight(self.full_precision_weight())

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        quantized = self.input_quantizer is not None and not args and not kwargs
        if quantized and type(input) is Tensor and _is_plain_product(self, input):
            return self._product(input)
        if self.input_quantizer is not None:
            input = self.input_quantizer(input)
        return super().forward(input, *args, **kwargs)

    def _product(self, input: Tensor) -> Tensor:
        """What torch's own forward computes; where kernels quantize, without keeping quantized tensors for backward."""
        assert self.input_quantizer is not None
        x = self.input_quantizer.operand(input)
        parameter = self.full_precision_weight()
        weight = Operand(parameter) if is_sharded(parameter) else self.weight_quantizer.operand(parameter)
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        convolution = None
        if isinstance(self, _ConvNd):
            places = len(self.kernel_size)
            stride, padding, dilation = (_each_place(v, places) for v in (self.stride, self.padding, self.dilation))
            convolution = Convolution(stride, padding, dilation, self.groups)
        if x.ring is not None or weight.ring is not None:
            return product(x, weight, bias, convolution)
        if convolution is None:
            return F.linear(x.value, weight.value, bias)
        return self._conv_forward(x.value, weight.value, bias)  # type: ignore[operator]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name in ("weight_quantizer", "input_quantizer"):
            quantizer = getattr(self, name)
            if (
                quantizer is not None
                and f"{prefix}weight" in state_dict
                and f"{prefix}{name}.start_step" not in state_dict
            ):
                # Weights of a full-precision checkpoint: ranges fitted to other weights do not belong to them.
                quantizer.configure(calibrated=False)


_STOCK = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_plain_classes: dict[type[nn.Module], bool] = {}


def _is_plain_product(layer: QuantizedLayer, input: Tensor) -> bool:
    """Whether a layer computes the product that torch's own class of its kind computes, and nothing more."""
    base = layer.base_class
    if base not in _plain_classes:
        _plain_classes[base] = any(
            issubclass(base, stock)
            and all(getattr(base, name, None) is getattr(stock, name, None) for name in ("forward", "_conv_forward"))
            for stock in _STOCK
        )
    if not _plain_classes[base] or "_conv_forward" in layer.__dict__ or not input.numel():
        return False
    if isinstance(layer, _ConvNd):
        unpadded = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return unpadded and input.dim() == len(layer.kernel_size) + 2
    # Of what lies in memory otherwise torch multiplies in another order.
    return input.dim() > 1 and input.is_contiguous()


def _each_place(value: Any, places: int) -> tuple[int, ...]:
    """A number, or one number for all places, as torch's convolutions take it."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * places if len(values) == 1 else values


def switch(layer: nn.Module, weight_quantizer: Quantizer, input_quantizer: Quantizer | None) -> None:
    """Make a layer a quantized one, in place."""
    switch_class(layer, QuantizedLayer)
    layer.add_module("weight_quantizer", weight_quantizer)
    layer.add_module("input_quantizer", input_quantizer)


def switch_back(layer: QuantizedLayer, shared: bool = False, written: bool = True) -> None:
    """Make a quantized layer a plain one, in place, with the quantized weight ``written`` into its Parameter.

    One that is ``shared`` with a module that reads it in full precision, an embedding for one, is left to that; the
    layer gets a Parameter of its own.
    """
    if written:
        _write(layer, shared)
    for name in ("weight_quantizer", "input_quantizer"):
        layer._modules.pop(name, None)
    switch_class_back(layer)


def _write(layer: QuantizedLayer, shared: bool) -> None:
    with torch.no_grad():
        weight = layer.full_precision_weight()
        training = layer.weight_quantizer.training
        layer.weight_quantizer.eval()
        try:
            value = layer.weight_quantizer(whole(weight))
            if isinstance(weight, DTensor):
                value = distribute_tensor(value, weight.device_mesh, weight.placements)
            if shared:
                layer._parameters["weight"] = nn.Parameter(value, requires_grad=weight.requires_grad)
            else:
                weight.copy_(value)
        finally:
            layer.weight_quantizer.train(training)
