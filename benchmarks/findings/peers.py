"""The methods that CPQ is measured against, at the same layers and widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from cpq_lightning.functional import level_bounds


@dataclass(frozen=True)
class Bits:
    """Widths of one layer's weight and of its input."""

    weight: int
    act: int


Make = Callable[[int, bool], nn.Module]


class QuantizedLayer(nn.Module):
    """A layer between a quantizer of its input and one of its weight.

    Args:
        layer: A convolution or linear layer.
        bits: Its widths.
        signed_input: Whether its input has negative values.
        make: Makes a quantizer of a width and whether its grid reaches below zero.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, bits: Bits, signed_input: bool, make: Make) -> None:
        super().__init__()
        self.layer = layer
        self.weight_quantizer = make(bits.weight, True)
        self.input_quantizer = make(bits.act, signed_input)

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.input_quantizer(x), self.weight_quantizer(self.layer.weight)
        if isinstance(self.layer, nn.Linear):
            return linear(x, weight, self.layer.bias)
        return self.layer._conv_forward(x, weight, self.layer.bias)

    @torch.no_grad()
    def weights(self) -> tuple[Tensor, Tensor]:
        """The weight, and what evaluation makes of it."""
        return self.layer.weight, self.weight_quantizer(self.layer.weight)


def replace_layers(model: nn.Module, bits: Mapping[str, Bits], images: Tensor, make: Make) -> nn.Module:
    """Quantize the layers that ``bits`` names, in place; quantizers start from the first batch.

    Args:
        model: The network in full precision.
        bits: Widths by layer; the first layer sees images, which have negative values, all others what a ReLU leaves.
        images: A training batch.
        make: Makes a quantizer.
    """
    first = next(iter(bits))
    for name, own in bits.items():
        parent, _, leaf = name.rpartition(".")
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        setattr(model.get_submodule(parent), leaf, QuantizedLayer(layer, own, name == first, make))
    start(model, images)
    return model


@torch.no_grad()
def start(model: nn.Module, images: Tensor) -> None:
    """Show a batch to the network, without leaving a trace in its batch norms."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


class StepAtFirst(nn.Module):
    """A quantizer whose step starts at the first values that come: ``2 E|x| / sqrt(highest level)``, as LSQ's."""

    def __init__(self, bits: int, signed: bool) -> None:
        super().__init__()
        self.low, self.high = level_bounds(bits, signed)
        self.step = nn.Parameter(torch.ones(1))
        self._started = False

    def forward(self, x: Tensor) -> Tensor:
        if not self._started:
            with torch.no_grad():
                self.step.copy_(2 * x.abs().mean() / max(1, self.high) ** 0.5)
            self._started = True
        return self.quantize(x)

    def quantize(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class LearnedStep(StepAtFirst):
    """LSQ (Esser et al., ICLR 2020) by torch's own kernel, as its quantization-aware training calls it."""

    def __init__(self, bits: int, signed: bool) -> None:
        super().__init__(bits, signed)
        self.register_buffer("zero", torch.zeros(1))

    def quantize(self, x: Tensor) -> Tensor:
        factor = 1 / (x.numel() * max(1, self.high)) ** 0.5
        return torch._fake_quantize_learnable_per_tensor_affine(x, self.step, self.zero, self.low, self.high, factor)
