"""Gives quantized weights to forwards that read a layer's ``weight`` instead of calling the layer.

A quantized layer's ``weight`` is its Parameter. torch's convolutions and linear layers get the quantized weight as an
argument (:mod:`cpq_lightning.attach.layers`). Forwards that read ``self.weight``, as in timm's ``StdConv2d`` and
``nn.ConvTranspose2d``, or ``self.out_proj.weight``, as in ``nn.MultiheadAttention``, run within :class:`ReadQuantized`.
So do forwards of modules that share the Parameter, such as an embedding that is tied to the head
(:mod:`cpq_lightning.attach.tied`). Code in such a forward that writes to the weight still writes to the Parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map

from cpq_lightning.attach.class_switch import Switched, switch_class, switch_class_back
from cpq_lightning.attach.decomposed import Decomposed
from cpq_lightning.attach.forward_mode import ForwardMode
from cpq_lightning.nn.quantizer import Quantizer

# Functions that return a tensor's properties, or an alias of its memory for writing.
_PROPERTIES = frozenset(
    {
        "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "is_contiguous", "data_ptr",
        "is_floating_point", "is_complex", "element_size", "get_device", "untyped_storage", "storage", "detach",
        "register_hook", "register_post_accumulate_grad_hook", "retain_grad", "backward", "is_inference", "is_shared",
        "__len__", "__repr__", "__hash__", "__format__", "__reduce_ex__", "__deepcopy__", "__dir__", "is_tensor",
        "is_same_size", "type", "has_names", "dim_order", "_is_view",
    }
)  # fmt: skip
# Attributes that are computed from the values; all others are properties of the tensor.
_COMPUTED = tuple(getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag"))


class ReadQuantized(ForwardMode):
    """Function mode around a forward in which operations on the given weights read them quantized, except writes.

    Args:
        weights: Pairs of a weight, as the forward reads it, and its quantizer.
    """

    def __init__(self, weights: Sequence[tuple[Tensor, Callable[[Tensor], Tensor]]]) -> None:
        super().__init__()
        self.weights = list(weights)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._reads((args, kwargs)) or _reads_properties(func):
            return func(*args, **kwargs)
        self.refuse_reentrant_checkpoint()
        if writes(func):
            # It writes to the first argument and reads the others.
            return func(*args[:1], *self._quantized(args[1:]), **self._quantized(kwargs))
        out = {"out": kwargs["out"]} if "out" in kwargs else {}
        return func(*self._quantized(args), **{**self._quantized(kwargs), **out})

    def _reads(self, values: Any) -> bool:
        if isinstance(values, dict):
            values = tuple(values.values())
        # A tuple instead of a union of types, which torch 2.8 does not compile.
        if isinstance(values, (tuple, list)):
            return any(self._reads(value) for value in values)
        return any(values is weight for weight, _ in self.weights)

    def _quantized(self, values: Any) -> Any:
        return tree_map(self._quantized_if_weight, values)

    def _quantized_if_weight(self, value: Any) -> Any:
        for weight, quantizer in self.weights:
            if value is weight:
                return quantizer(value)
        return value


@torch.compiler.assume_constant_result
def _reads_properties(func: Any) -> bool:
    """Whether a function only returns properties of its argument, or an alias of its memory."""
    name = getattr(func, "__name__", "")
    return name in _PROPERTIES or name == "__set__" or (name == "__get__" and func not in _COMPUTED)


@torch.compiler.assume_constant_result
def writes(func: Any) -> bool:
    """Whether a function writes to its first argument."""
    name = getattr(func, "__name__", "")
    if name.endswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__invert__", "__index__", "__int__"))
    return name.endswith("_")


class WeightReader(Switched):
    """Mixin for modules that multiply by the weights of quantized layers without calling these layers."""

    weight_sources: tuple[str, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layers: list[Any] = [self.get_submodule(name) for name in self.weight_sources]
        if not any("parametrizations" in layer._modules for layer in layers):
            return self._base_forward(layers, *args, **kwargs)
        # Cached, because a parametrization computes a new tensor each time that the forward reads the weight.
        with parametrize.cached():
            return self._base_forward(layers, *args, **kwargs)

    def _base_forward(self, layers: list[Any], *args: Any, **kwargs: Any) -> Any:
        pairs = [(layer.weight, layer.weight_quantizer) for layer in layers if hasattr(layer, "weight_quantizer")]
        if isinstance(self, nn.MultiheadAttention) and torch.compiler.is_compiling():
            # Self-attention (query is key) has a fast path in evaluation, which multiplies by the full-precision
            # weight. An active torch function mode disables it, but code that torch 2.8 compiles does not look at the
            # mode. A view is not the same object as the key, so that the fast path is not taken.
            if args:
                args = (args[0].view_as(args[0]), *args[1:])
            else:
                kwargs = {**kwargs, "query": kwargs["query"].view_as(kwargs["query"])}
        with ReadQuantized(pairs):
            return super().forward(*args, **kwargs)


# Attribute that keeps an embedding's ``sparse``.
_SPARSE = "_cpq_before_sparse"


def make_dense(module: nn.Module) -> None:
    """Let an embedding's gradient be dense, because a quantizer's gradient is."""
    if getattr(module, "sparse", False):
        module.__dict__[_SPARSE] = True
        cast(Any, module).sparse = False


def restore_sparse(module: nn.Module) -> None:
    """Undo :func:`make_dense`."""
    if module.__dict__.pop(_SPARSE, False):
        cast(Any, module).sparse = True


class TiedReader(Switched):
    """Mixin for modules that share the Parameter of a quantized layer, and read it."""

    weight_quantizer: Quantizer
    tied_name: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weight = self._parameters[self.tied_name]
        assert weight is not None
        with ReadQuantized([(weight, self.weight_quantizer)]):
            return super().forward(*args, **kwargs)


def read_weights(model: nn.Module, layer_class: type) -> None:
    """Make a ``nn.MultiheadAttention`` that is not decomposed, and does not call ``out_proj``, read ``out_proj.weight``
    quantized.

    Args:
        model: The model to search.
        layer_class: The class of quantized layers.
    """
    for module in list(model.modules()):
        readable = isinstance(module, nn.MultiheadAttention) and not isinstance(module, WeightReader | Decomposed)
        if readable and isinstance(module.out_proj, layer_class):
            switch_class(module, WeightReader).weight_sources = ("out_proj",)


def leave_weights(model: nn.Module) -> None:
    """Undo :func:`read_weights`."""
    for module in list(model.modules()):
        if isinstance(module, WeightReader):
            module.__dict__.pop("weight_sources", None)
            switch_class_back(module)


# Prefix of the attributes that keep previous values; and the values with which a module calls its layers.
_BEFORE = "_cpq_before_"
_FUSED_PATHS: dict[str, Any] = {"activation_relu_or_gelu": 0, "use_nested_tensor": False}


def avoid_fused_paths(model: nn.Module, layer_class: type) -> None:
    """Make torch's transformer encoders call their layers in evaluation too.

    ``nn.TransformerEncoder`` and its layers have a fused path for evaluation without gradients, which bypasses the
    layers inside. If one of these is quantized, the path is disabled by the attributes that torch checks before taking
    it.

    Args:
        model: The model to search.
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
    """Undo :func:`avoid_fused_paths`."""
    for module in model.modules():
        for name in _FUSED_PATHS:
            if _BEFORE + name in module.__dict__:
                setattr(module, name, module.__dict__.pop(_BEFORE + name))
