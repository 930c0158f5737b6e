"""What CPQ is compared with, at the sites of CPQ: every convolution or linear layer but the first and the last."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, logsigmoid

_BITS = 4


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d | nn.Linear]]:
    """All convolutions and linear layers, with their names."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            yield name, module


def is_site(model: nn.Module, name: str) -> bool:
    """Whether a layer is quantized: neither the first convolution nor the classifier of a timm model."""
    known: Any = model.default_cfg
    return name not in (known["first_conv"], known["classifier"])


def _replace(model: nn.Module, make: Callable[[Any], nn.Module]) -> nn.Module:
    """The model with what ``make`` makes of each layer in its place."""
    for name, layer in layers(model):
        if is_site(model, name):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, make(layer))
    return model


class _Quantized(nn.Module):
    """A layer between two quantizers."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, make: Callable[[Tensor, bool], nn.Module]) -> None:
        super().__init__()
        self.layer = layer
        self.weight_quantizer = make(layer.weight, True)
        # What comes to a convolution has been through a ReLU in the networks that are measured.
        self.input_quantizer = make(torch.ones(1), isinstance(layer, nn.Linear))

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.input_quantizer(x), self.weight_quantizer(self.layer.weight)
        if isinstance(self.layer, nn.Linear):
            return linear(x, weight, self.layer.bias)
        return self.layer._conv_forward(x, weight, self.layer.bias)


def _bounds(signed: bool) -> tuple[int, int]:
    return (-(2 ** (_BITS - 1)), 2 ** (_BITS - 1) - 1) if signed else (0, 2**_BITS - 1)


class _LearnableFakeQuantize(nn.Module):
    """torch's own kernel of LSQ (Esser et al., ICLR 2020), as its quantization-aware training calls it."""

    def __init__(self, values: Tensor, signed: bool) -> None:
        super().__init__()
        self.bounds = _bounds(signed)
        self.scale = nn.Parameter((2 * values.detach().abs().mean() / self.bounds[1] ** 0.5).reshape(1))
        self.zero = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        factor = 1 / (x.numel() * self.bounds[1]) ** 0.5
        return torch._fake_quantize_learnable_per_tensor_affine(x, self.scale, self.zero, *self.bounds, factor)


def torch_learnable(model: nn.Module, images: Tensor) -> nn.Module:
    return _replace(model, lambda layer: _Quantized(layer, _LearnableFakeQuantize))


class BruteForce(nn.Module):
    """CPQ as one writes it down first: the probability of every grid point for every element, and autograd.

    Of a logistic noise the point ``n`` has the probability ``S((n + 1/2 - u) / s) - S((n - 1/2 - u) / s)`` with
    ``u = x / step`` and ``s = sigma / step``, which is ``S((n + 1/2 - u) / s) · S((u - n + 1/2) / s)`` but for a factor
    that all points share. Several tensors of ``2**bits`` times the size of ``x`` are kept for backward.

    Args:
        values: What the starting step is fitted to.
        signed: Whether the grid reaches below zero.
    """

    levels: Tensor

    def __init__(self, values: Tensor, signed: bool) -> None:
        super().__init__()
        low, high = _bounds(signed)
        self.register_buffer("levels", torch.arange(low, high + 1, dtype=values.dtype))
        step = (2 * values.detach().abs().mean() / high**0.5).reshape(1)
        self.step, self.sigma = nn.Parameter(step), nn.Parameter(step / 3)

    def forward(self, x: Tensor) -> Tensor:
        u, s = (x / self.step).unsqueeze(-1), self.sigma / self.step
        log_p = logsigmoid((self.levels + 0.5 - u) / s) + logsigmoid((u - self.levels + 0.5) / s)
        probability = log_p.softmax(-1)
        mean = (self.levels * probability).sum(-1)
        chosen = self.levels[probability.detach().argmax(-1)]
        # The chosen point itself, and the mean's derivative times a step that is held.
        return self.step * chosen + self.step.detach() * (mean - mean.detach())


def brute_force(model: nn.Module, images: Tensor) -> nn.Module:
    return _replace(model, lambda layer: _Quantized(layer, BruteForce))


def brevitas(model: nn.Module, images: Tensor) -> nn.Module:
    """Scales are parameters, started from statistics: Brevitas's default for activations, its option for weights."""
    from brevitas.nn import QuantConv2d, QuantLinear  # type: ignore[import-not-found]
    from brevitas.quant import (  # type: ignore[import-not-found]
        Int8ActPerTensorFloat,
        Int8WeightPerTensorFloat,
        Uint8ActPerTensorFloat,
    )

    settings = {
        "weight_quant": Int8WeightPerTensorFloat,
        "weight_bit_width": _BITS,
        "weight_scaling_impl_type": "parameter_from_stats",
        "input_bit_width": _BITS,
        # In place of 300 steps with a percentile each, which is not what most of a training costs.
        "input_collect_stats_steps": 1,
    }

    def make(layer: Any) -> nn.Module:
        bias = layer.bias is not None
        if isinstance(layer, nn.Linear):
            made = QuantLinear(
                layer.in_features, layer.out_features, bias=bias, input_quant=Int8ActPerTensorFloat, **settings
            )
        else:
            made = QuantConv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
                layer.groups, layer.padding_mode, bias, input_quant=Uint8ActPerTensorFloat, **settings,
            )  # fmt: skip
        made.load_state_dict(layer.state_dict(), strict=False)
        return made

    model = _replace(model, make).train()
    with torch.no_grad():
        # One batch for the statistics, and one in which the scales become parameters.
        model(images)
        model(images)
    return model


def nncf(model: nn.Module, images: Tensor) -> nn.Module:
    """int8, symmetric, a scale for each channel of a weight: NNCF's defaults, and its path to train afterwards.

    Where two layers have one input, NNCF quantizes it once.
    """
    # It builds a C++ extension in the first step, and would give up after a minute.
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")
    import nncf  # type: ignore[import-not-found]

    # Operations are named "layer/conv2d/0", with slashes in the layer's name.
    sites = [name.replace(".", "/") for name, _ in layers(model) if is_site(model, name)]
    others = rf"^(?!({'|'.join(map(re.escape, sites))})/(conv2d|linear)/).*"
    return nncf.quantize(
        model.eval(),
        nncf.Dataset([images]),
        subset_size=1,
        ignored_scope=nncf.IgnoredScope(patterns=[others], validate=False),
        advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
    )
