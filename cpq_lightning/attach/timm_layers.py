"""What timm's own layers need: which of them hold a weight, and attention that reads a layer's weight by itself."""

from __future__ import annotations

from typing import Any, cast

from timm.layers import CondConv2d  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

# What the module did before, kept on it.
_BEFORE = "_cpq_qkv_bias_separate"


def holds_weight(module: nn.Module) -> bool:
    """Whether a module is a layer with a weight to quantize: convolutions, transposed and conditional ones too, and
    linear layers.
    """
    if not isinstance(module, nn.Linear | _ConvNd | CondConv2d):
        return False
    computed = module._modules.get("parametrizations")
    if computed is not None and "weight" in computed._modules:
        # Not read: some normalizations count how often they are.
        return all(p.is_floating_point() for p in computed._modules["weight"].parameters())  # type: ignore[union-attr]
    # A Parameter, or what a pruning mask or an older normalization has made of one.
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.is_floating_point()


def shared_weight(layer: nn.Module) -> object:
    """The Parameter that a layer may share with others; the layer itself, where its weight is computed from one."""
    parameter = layer._parameters.get("weight")
    return layer if parameter is None else parameter


def weight_parameters(layer: nn.Module) -> list[nn.Parameter]:
    """The Parameters that a layer's weight is, or is computed from by a parametrization or a pruning mask."""
    own = layer._parameters.get("weight")
    computed = (p for n, p in layer.named_parameters() if n != "bias" and "_quantizer." not in n)
    return list(computed) if own is None else [own]


def call_projections(model: nn.Module) -> None:
    """Let attention call its ``qkv`` layer, so that the layer quantizes its input.

    timm's beit, eva and swin_transformer_v2 join three biases and multiply by ``qkv.weight`` themselves; with
    ``qkv_bias_separate``, timm's own switch, they call the layer and add the biases behind it: the same sum, rounded
    once more.
    """
    for module in model.modules():
        if getattr(module, "qkv_bias_separate", None) is False and isinstance(getattr(module, "qkv", None), nn.Module):
            cast(Any, module).qkv_bias_separate = True
            module.__dict__[_BEFORE] = False


def restore_projections(model: nn.Module) -> None:
    """Take back :func:`call_projections`."""
    for module in model.modules():
        if _BEFORE in module.__dict__:
            cast(Any, module).qkv_bias_separate = module.__dict__.pop(_BEFORE)
