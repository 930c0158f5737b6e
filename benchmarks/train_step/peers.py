"""What CPQ is compared with, at the sites of CPQ: every convolution or linear layer but the first and the last."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from benchmarks.quantized_layer import (
    Bits,
    LearnedStep,
    Make,
    QuantizedLayer,
    StepAtFirst,
    brevitas_layer,
    replace_layers,
    show,
)

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


def _sites(model: nn.Module) -> dict[str, Bits]:
    """What comes to a convolution has been through a ReLU in the networks that are measured."""
    return {n: Bits(_BITS, _BITS, isinstance(layer, nn.Linear)) for n, layer in layers(model) if is_site(model, n)}


def _quantize(model: nn.Module, make: Make) -> nn.Module:
    return replace_layers(model, _sites(model), lambda layer, bits: QuantizedLayer(layer, bits, make))


def torch_learnable(model: nn.Module, images: Tensor) -> nn.Module:
    return show(_quantize(model, LearnedStep), images)


class BruteForce(StepAtFirst):
    """CPQ as one writes it down first: the probability of every grid point for every element, and autograd.

    Of a logistic noise the point ``n`` has the probability ``S((n + 1/2 - u) / s) - S((n - 1/2 - u) / s)`` with
    ``u = x / step`` and ``s = sigma / step``, which is ``S((n + 1/2 - u) / s) · S((u - n + 1/2) / s)`` but for a factor
    that all points share. Several tensors of ``2**bits`` times the size of ``x`` are kept for backward.
    """

    levels: Tensor

    def __init__(self, bits: int, signed: bool) -> None:
        super().__init__(bits, signed)
        self.register_buffer("levels", torch.arange(self.low, self.high + 1.0))
        self.sigma = nn.Parameter(torch.ones(1))

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        super().start(x)
        self.sigma.copy_(self.step / 3)

    def quantize(self, x: Tensor) -> Tensor:
        step = self.step
        u, s = (x / step).unsqueeze(-1), self.sigma / step
        log_p = logsigmoid((self.levels + 0.5 - u) / s) + logsigmoid((u - self.levels + 0.5) / s)
        probability = log_p.softmax(-1)
        mean = (self.levels * probability).sum(-1)
        chosen = self.levels[probability.detach().argmax(-1)]
        # The chosen point itself, and the mean's derivative times a step that is held.
        return step * chosen + step.detach() * (mean - mean.detach())


def brute_force(model: nn.Module, images: Tensor) -> nn.Module:
    return show(_quantize(model, BruteForce), images)


def brevitas(model: nn.Module, images: Tensor) -> nn.Module:
    model = replace_layers(model, _sites(model), brevitas_layer)
    return show(show(model, images), images)


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
