"""Layers as other methods quantize them: LSQ by torch's own kernel, and Brevitas's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear

from cpq_lightning.functional.grid import level_bounds
from cpq_lightning.functional.grid_fit import fit_histogram
from cpq_lightning.functional.ranges import mse_scale

# Values that a step is fitted to are enough.
_FITTED = 100_003

Layer = nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class Bits:
    """Bits of one layer's weight and of its input, and whether the input has negative values."""

    weight: int
    act: int
    signed: bool


Make = Callable[[int, bool], nn.Module]


class QuantizedLayer(nn.Module):
    """A layer between a quantizer of its input and one of its weight.

    Args:
        layer: A convolution or linear layer.
        bits: Its widths.
        make: Makes a quantizer of a width and whether its grid reaches below zero.
        make_weight: The same for the weight; ``None`` means ``make``.
    """

    def __init__(self, layer: Layer, bits: Bits, make: Make, make_weight: Make | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.weight_quantizer = (make_weight or make)(bits.weight, True)
        self.input_quantizer = make(bits.act, bits.signed)

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.input_quantizer(x), self.weight_quantizer(self.layer.weight)
        if isinstance(self.layer, nn.Linear):
            return linear(x, weight, self.layer.bias)
        if type(self.layer).forward is not nn.Conv2d.forward:
            # Such as a convolution that pads by the size of its input.
            return functional_call(self.layer, {"weight": weight}, (x,))
        return self.layer._conv_forward(x, weight, self.layer.bias)

    @torch.no_grad()
    def weights(self) -> tuple[Tensor, Tensor]:
        """The weight, and what evaluation makes of it."""
        return self.layer.weight, self.weight_quantizer(self.layer.weight)


def replace_layers(model: nn.Module, bits: Mapping[str, Bits], make: Callable[[Layer, Bits], nn.Module]) -> nn.Module:
    """Put what ``make`` makes of a layer and its widths in the place of each layer that ``bits`` names."""
    for name, width in bits.items():
        parent, _, leaf = name.rpartition(".")
        layer = model.get_submodule(name)
        assert isinstance(layer, Layer)
        setattr(model.get_submodule(parent), leaf, make(layer, width))
    return model


@torch.no_grad()
def show(model: nn.Module, images: Tensor) -> nn.Module:
    """Show a batch to the network, for what starts from it; no trace stays in its batch norms."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model


class StepAtFirst(nn.Module):
    """A quantizer whose step starts at the first values that come: ``2 E|x| / sqrt(highest level)``, as LSQ's.

    What trains is the step's logarithm: an adaptive optimizer moves every parameter by about its rate, whatever its
    size, and would move a small step by a third of itself in an update.
    """

    def __init__(self, bits: int, signed: bool) -> None:
        super().__init__()
        self.low, self.high = level_bounds(bits, None if signed else 0)
        self.log_scale = nn.Parameter(torch.zeros(1))
        self._started = False

    @property
    def step(self) -> Tensor:
        """In the unit of what is quantized, shape (1,)."""
        return self.log_scale.exp()

    def forward(self, x: Tensor) -> Tensor:
        if not self._started:
            self.start(x)
            self._started = True
        return self.quantize(x)

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        """Fit the step to the first values."""
        self.log_scale.copy_((2 * x.abs().mean() / max(1, self.high) ** 0.5).log())

    def quantize(self, x: Tensor) -> Tensor:
        """Quantize ``x`` with the step as it is."""
        raise NotImplementedError

    # As what pulls weights to their grid asks for it.
    active, learns_bits = True, False

    def nearest(self, x: Tensor) -> Tensor:
        """The grid points that evaluation puts values on."""
        step = self.step
        return step * (x / step).round().clamp(self.low, self.high)


class LearnedStep(StepAtFirst):
    """LSQ (Esser et al., ICLR 2020) by torch's own kernel, as its quantization-aware training calls it.

    Args:
        bits: Width.
        signed: Whether the grid reaches below zero.
        least_error: Whether the step starts where the first values have the least squared error, in place of LSQ's own
            start, which is far from it at 8 bits.
    """

    def __init__(self, bits: int, signed: bool, least_error: bool = False) -> None:
        super().__init__(bits, signed)
        self.bits, self.signed, self.least_error = bits, signed, least_error
        self.register_buffer("zero", torch.zeros(1))

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        super().start(x)
        if self.least_error:
            flat = x.flatten()[:: max(1, x.numel() // _FITTED)]
            self.log_scale.copy_(mse_scale(flat[None], bits=self.bits, zero_point=None if self.signed else 0).log())

    def quantize(self, x: Tensor) -> Tensor:
        factor = 1 / (x.numel() * max(1, self.high)) ** 0.5
        return torch._fake_quantize_learnable_per_tensor_affine(x, self.step, self.zero, self.low, self.high, factor)


class LearnedOffset(LearnedStep):
    """LSQ+ (Bhalgat et al., CVPR workshops 2020) by the same kernel: an unsigned grid whose zero point trains too.

    Scale and zero point start at the least squared error, over scales and zero points. A weight has LSQ's signed grid,
    as in the paper.

    Args:
        bits: Width.
        signed: Whether the first values are a weight or have negative values.
        of_weight: Whether this is a weight's quantizer.
        trained: Whether the zero point trains; ``False`` leaves it where it started.
    """

    def __init__(self, bits: int, signed: bool, of_weight: bool = False, trained: bool = True) -> None:
        super().__init__(bits, signed, least_error=True)
        self.of_weight, self.trained = of_weight, trained
        if not of_weight:
            self.low, self.high = 0, 2**bits - 1
            self.offset = nn.Parameter(torch.zeros(1), requires_grad=trained)

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        if self.of_weight:
            super().start(x)
            return
        flat = x.flatten()[:: max(1, x.numel() // _FITTED)].float().sort().values[None]
        fit = fit_histogram(flat, torch.ones_like(flat).double(), self.bits, "offset")
        self.log_scale.copy_(fit.scale.log())
        self.offset.fill_(fit.zero_point)

    def quantize(self, x: Tensor) -> Tensor:
        if self.of_weight:
            return super().quantize(x)
        factor = 1 / (x.numel() * self.high) ** 0.5
        return torch._fake_quantize_learnable_per_tensor_affine(x, self.step, self.offset, self.low, self.high, factor)


def brevitas_layer(layer: Layer, bits: Bits) -> nn.Module:
    """Brevitas's layer with learned scales, which start at the least squared error, and a grid of ``2**bits`` points:
    what it offers for few bits. Its defaults, made for 8, start at the largest value and have a point less. A second
    batch makes parameters of the statistics of the first.
    """
    from brevitas.nn import QuantConv2d, QuantLinear  # type: ignore[import-not-found]
    from brevitas.quant import (  # type: ignore[import-not-found]
        Int8ActPerTensorFloatMSE,
        Int8WeightPerTensorFloatMSE,
        Uint8ActPerTensorFloatMSE,
    )

    settings = {
        "bias": layer.bias is not None,
        "weight_quant": Int8WeightPerTensorFloatMSE,
        "weight_bit_width": bits.weight,
        "weight_narrow_range": False,
        "input_quant": Int8ActPerTensorFloatMSE if bits.signed else Uint8ActPerTensorFloatMSE,
        "input_bit_width": bits.act,
        # In place of 300 steps with a percentile each, which is not what most of a training costs.
        "input_collect_stats_steps": 1,
    }
    if isinstance(layer, nn.Linear):
        made = QuantLinear(layer.in_features, layer.out_features, **settings)
    else:
        made = QuantConv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            layer.groups, layer.padding_mode, **settings,
        )  # fmt: skip
    made.load_state_dict(layer.state_dict(), strict=False)
    return made
