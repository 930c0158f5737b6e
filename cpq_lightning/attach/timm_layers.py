"""Support for timm layers: which have a weight to quantize, and attention that reads a layer's weight itself."""

from __future__ import annotations

from typing import Any, cast

from timm.layers import CondConv2d  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from cpq_lightning.attach.decomposed import ParameterLayer, holder_of, whole_parameter
from cpq_lightning.attach.parametrized import computed_from

# Attribute that keeps a module's previous setting.
_BEFORE = "_cpq_qkv_bias_separate"


def holds_weight(module: nn.Module) -> bool:
    """Whether a module is a layer with a weight to quantize: a convolution (also transposed or conditional), a linear
    layer, or an embedding that is quantized already.
    """
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        # As a layer, not as a module that is tied to one.
        return "input_quantizer" in module._modules
    if not isinstance(module, nn.Linear | _ConvNd | CondConv2d):
        return False
    computed = module._modules.get("parametrizations")
    if computed is not None and "weight" in computed._modules:
        # The weight is not read here, because some parametrizations change when they are read.
        return all(p.is_floating_point() for p in computed._modules["weight"].parameters())  # type: ignore[union-attr]
    # A Parameter, or the tensor that a pruning mask or an older parametrization computes from one.
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.is_floating_point()


def looks_up(module: nn.Module) -> bool:
    """Whether a module is an embedding, whose table ``embeddings=True`` quantizes."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.weight.is_floating_point()


def shared_weight(layer: nn.Module) -> object:
    """The Parameter that a layer may share with others; the layer itself if its weight is computed, or a part."""
    parameter = whole_parameter(layer)
    return layer if parameter is None else parameter


def weight_parameters(layer: nn.Module) -> list[nn.Parameter]:
    """The Parameter that has the layer's weight, or the Parameters from which a parametrization or a pruning mask
    computes it.
    """
    if isinstance(layer, ParameterLayer):
        return computed_from(*holder_of(layer.owner, layer.part.weight))
    weight = layer._parameters.get("weight")
    computed = (p for n, p in layer.named_parameters() if n != "bias" and "_quantizer." not in n)
    return list(computed) if weight is None else [weight]


def call_projections(model: nn.Module) -> None:
    """Make attention call its ``qkv`` layer, so that the layer quantizes its input.

    timm's beit, eva and swin_transformer_v2 concatenate three biases and multiply by ``qkv.weight`` themselves. With
    timm's option ``qkv_bias_separate``, they call the layer and add the biases afterwards: the same sum, with one more
    rounding.
    """
    for module in model.modules():
        if getattr(module, "qkv_bias_separate", None) is False and isinstance(getattr(module, "qkv", None), nn.Module):
            cast(Any, module).qkv_bias_separate = True
            module.__dict__[_BEFORE] = False


def restore_projections(model: nn.Module) -> None:
    """Undo :func:`call_projections`."""
    for module in model.modules():
        if _BEFORE in module.__dict__:
            cast(Any, module).qkv_bias_separate = module.__dict__.pop(_BEFORE)
