"""Forwards that read a quantized layer's weight themselves: what they compute from it is computed from it quantized.

A quantized layer's ``weight`` is its Parameter. torch's own convolutions and linear layers are handed the quantized
weight (:mod:`cpq_lightning.attach.layers`); a forward that reads ``self.weight``, as timm's ``StdConv2d`` and
``nn.ConvTranspose2d`` do, or ``self.out_proj.weight``, as ``nn.MultiheadAttention`` does, runs within
:class:`ReadQuantized`; so does the forward of a module that has the same Parameter, such as an embedding that is tied
to the head (:mod:`cpq_lightning.attach.tied`). Writing to the weight reaches the Parameter there as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from cpq_lightning.attach.class_switch import Switched, switch_class, switch_class_back
from cpq_lightning.nn.quantizer import Quantizer

# What asks about a tensor, or for another name of its memory, to write to it.
_ASKING = frozenset(
    {
        "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "is_contiguous", "data_ptr",
        "is_floating_point", "is_complex", "element_size", "get_device", "untyped_storage", "storage", "detach",
        "register_hook", "register_post_accumulate_grad_hook", "retain_grad", "backward", "is_inference", "is_shared",
        "__len__", "__repr__", "__hash__", "__format__", "__reduce_ex__", "__deepcopy__", "__dir__", "is_tensor",
        "is_same_size", "type", "has_names", "dim_order", "_is_view",
    }
)  # fmt: skip
# Attributes that are computed from the values; all others tell about the tensor.
_COMPUTED = tuple(getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag"))


class ReadQuantized(TorchFunctionMode):
    """Entered around a forward: operations on one of the weights get it quantized, but those that write to it.

    Args:
        weights: Each weight as the forward reads it, with its quantizer.
    """

    def __init__(self, weights: Sequence[tuple[Tensor, Quantizer]]) -> None:
        super().__init__()
        self.weights = weights

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._reads((args, kwargs)) or _asks(func):
            return func(*args, **kwargs)
        if writes(func):
            # To its first argument; the others are read.
            return func(*args[:1], *self._quantized(args[1:]), **self._quantized(kwargs))
        out = {"out": kwargs["out"]} if "out" in kwargs else {}
        return func(*self._quantized(args), **{**self._quantized(kwargs), **out})

    def _reads(self, values: Any) -> bool:
        if isinstance(values, dict):
            values = tuple(values.values())
        # No union of types: torch 2.8 does not compile one.
        if isinstance(values, (tuple, list)):
            return any(self._reads(value) for value in values)
        return any(values is weight for weight, _ in self.weights)

    def _quantized(self, values: Any) -> Any:
        return tree_map(self._one, values)

    def _one(self, value: Any) -> Any:
        for weight, quantizer in self.weights:
            if value is weight:
                return quantizer(value)
        return value


@torch.compiler.assume_constant_result
def _asks(func: Any) -> bool:
    """Whether a function only tells about its argument, or names its memory otherwise."""
    name = getattr(func, "__name__", "")
    return name in _ASKING or name == "__set__" or (name == "__get__" and func not in _COMPUTED)


@torch.compiler.assume_constant_result
def writes(func: Any) -> bool:
    """Whether a function writes to its first argument."""
    name = getattr(func, "__name__", "")
    if name.endswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__invert__", "__index__", "__int__"))
    return name.endswith("_")


class WeightReader(Switched):
    """Mixed in before the class of a module that multiplies by the weights of quantized layers without calling them."""

    weight_sources: tuple[str, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layers: list[Any] = [self.get_submodule(name) for name in self.weight_sources]
        if not any("parametrizations" in layer._modules for layer in layers):
            return self._own_forward(layers, *args, **kwargs)
        # A parametrization would compute another tensor each time that the forward reads its weight.
        with parametrize.cached():
            return self._own_forward(layers, *args, **kwargs)

    def _own_forward(self, layers: list[Any], *args: Any, **kwargs: Any) -> Any:
        pairs = [(layer.weight, layer.weight_quantizer) for layer in layers if hasattr(layer, "weight_quantizer")]
        if isinstance(self, nn.MultiheadAttention) and torch.compiler.is_compiling():
            # In evaluation it has a fused path, for a query that is the key. A mode keeps it from that, but torch 2.8
            # does not see modes there when it compiles, and would multiply by the weight as it is.
            if args:
                args = (args[0].view_as(args[0]), *args[1:])
            else:
                kwargs = {**kwargs, "query": kwargs["query"].view_as(kwargs["query"])}
        with ReadQuantized(pairs):
            return super().forward(*args, **kwargs)


class TiedReader(Switched):
    """Mixed in before the class of a module that has the Parameter of a quantized layer as its own, and reads it."""

    weight_quantizer: Quantizer
    tied_name: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weight = self._parameters[self.tied_name]
        assert weight is not None
        with ReadQuantized([(weight, self.weight_quantizer)]):
            return super().forward(*args, **kwargs)


def read_weights(model: nn.Module, layer_class: type) -> None:
    """Let ``nn.MultiheadAttention``, which multiplies by ``out_proj.weight`` itself, multiply by it quantized.

    Args:
        model: What is searched for it.
        layer_class: The class of quantized layers.
    """
    for module in list(model.modules()):
        readable = isinstance(module, nn.MultiheadAttention) and not isinstance(module, WeightReader)
        if readable and isinstance(module.out_proj, layer_class):
            switch_class(module, WeightReader).weight_sources = ("out_proj",)


def leave_weights(model: nn.Module) -> None:
    """Take back :func:`read_weights`."""
    for module in list(model.modules()):
        if isinstance(module, WeightReader):
            module.__dict__.pop("weight_sources", None)
            switch_class_back(module)


# What the module had before, kept on it; and the value with which it calls its layers.
_BEFORE = "_cpq_before_"
_FUSED_PATHS: dict[str, Any] = {"activation_relu_or_gelu": 0, "use_nested_tensor": False}


def avoid_fused_paths(model: nn.Module, layer_class: type) -> None:
    """Let torch's encoders call their layers in evaluation too.

    ``nn.TransformerEncoder`` and its layers have a fused path for evaluation without gradients, which goes round the
    layers. Where one of these is quantized it is left, by the attributes that torch itself chooses it by.

    Args:
        model: What is searched for them.
        layer_class: The class of quantized layers.
    """
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            continue
        if not any(isinstance(inner, layer_class) for inner in module.modules()):
            continue
        for name, value in _FUSED_PATHS.items():
            if getattr(module, name, value):
                module.__dict__[_BEFORE + name] = getattr(module, name)
                setattr(module, name, value)


def restore_fused_paths(model: nn.Module) -> None:
    """Take back :func:`avoid_fused_paths`."""
    for module in model.modules():
        for name in _FUSED_PATHS:
            if _BEFORE + name in module.__dict__:
                setattr(module, name, module.__dict__.pop(_BEFORE + name))
