"""Modules that multiply by the weights of their layers without calling the layers, such as torchvision's
shifted-window attention: while a layer is quantized, such a product calls the layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import Tensor, nn

from cpq_lightning.attach.class_switch import Switched, switch_class, switch_class_back
from cpq_lightning.attach.forward_mode import ForwardMode
from cpq_lightning.attach.torch_ops import WITH_WEIGHT, product_operands

# The layers whose weights a class reads, by its name and that of its module.
_READ: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("torchvision.models.swin_transformer", "ShiftedWindowAttention"): ("qkv", "proj"),
}


class LayerCaller(Switched):
    """Mixin that calls a layer of the module wherever its forward multiplies by the layer's weight."""

    @classmethod
    def made_for(cls, base: type[nn.Module]) -> dict[str, Any]:
        @functools.wraps(base.forward)
        def forward(self: LayerCaller, *args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                layers = {name: self.get_submodule(name) for name in read_by(base)}
                for layer in layers.values():
                    hold: Callable[[], AbstractContextManager[Any]] | None = getattr(layer, "weight_held", None)
                    if hold is not None:
                        stack.enter_context(hold())
                stack.enter_context(_Calling([(layer.weight, layer) for layer in layers.values()]))
                return base.forward(self, *args, **kwargs)

        return {"forward": forward}


class _Calling(ForwardMode):
    """Function mode in which a product with one of the given weights calls its layer."""

    def __init__(self, layers: list[tuple[Any, Any]]) -> None:
        super().__init__()
        self.layers = layers

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in WITH_WEIGHT:
            return func(*args, **kwargs)
        x, weight = product_operands(func, args, kwargs)
        layer = next((layer for known, layer in self.layers if known is weight), None)
        if layer is None:
            return func(*args, **kwargs)
        self.refuse_reentrant_checkpoint()
        out = layer(x)
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        # torchvision's second version sets a part of the bias to zero.
        return out if bias is layer.bias else out + (_or_zero(bias) - _or_zero(layer.bias))


def _or_zero(bias: Tensor | None) -> Tensor | float:
    return 0.0 if bias is None else bias


def read_by(cls: type[nn.Module]) -> tuple[str, ...]:
    """Names of the layers whose weights the forward of a class reads, as far as it is known for that."""
    for base in cls.__mro__:
        if (names := _READ.get((base.__module__, base.__name__))) is not None:
            return names
    return ()


def call_layers(model: nn.Module, layer_class: type) -> None:
    """Make modules call their layers of a class instead of reading their weights."""
    for module in list(model.modules()):
        names = () if isinstance(module, LayerCaller) else read_by(type(module))
        if any(isinstance(module._modules.get(name), layer_class) for name in names):
            switch_class(module, LayerCaller)


def leave_calls(model: nn.Module) -> None:
    """Undo :func:`call_layers`."""
    for module in list(model.modules()):
        if isinstance(module, LayerCaller):
            switch_class_back(module)
