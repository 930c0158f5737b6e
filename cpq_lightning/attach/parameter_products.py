"""Modules that multiply by matrices of their own, as in ``F.linear(x, self.weight)``, ``x @ self.weight`` or an einsum.

Which Parameters a forward multiplies by is seen in a forward (:mod:`cpq_lightning.attach.find_products`). Such a
Parameter gets a layer in the module whose forward makes the product. The layer is called ``<name>_linear`` if the
matrix has the shape (outputs, inputs), as in ``F.linear``, and ``<name>_matmul`` if it is (inputs, outputs), as in
``x @ weight``; so a state tells what to build. While the forward runs, a function mode calls the layer instead of each
product with the matrix or its transposed.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cpq_lightning.attach.class_switch import Switched, switch_class
from cpq_lightning.attach.decomposed import Decomposed, ParameterLayer, Part, holder_of, reads_itself
from cpq_lightning.attach.matrix_products import as_layer_call, follow_matrix
from cpq_lightning.attach.weight_readers import ReadQuantized, writes

_LINEAR, _MATMUL = "_linear", "_matmul"
# Attribute of a module whose Parameters have become weights of layers: the layers, and whether they are transposed.
_OF_LAYERS = "_cpq_parameters_of_layers"
# Attribute of a module that multiplies by Parameters of modules that read them too: the layers, by name of these.
_SHARED = "_cpq_shared_with_layers"


def layer_name(path: str, outputs_first: bool) -> str:
    """The name of the layer for a Parameter.

    Args:
        path: The Parameter's name, seen from the module that multiplies.
        outputs_first: Whether its shape is (outputs, inputs).
    """
    return path.replace(".", "_") + (_LINEAR if outputs_first else _MATMUL)


class ParametersOfLayers(Switched):
    """Mixin for modules that had a Parameter that is now the weight of a layer: reading it reads the weight."""

    def __getattr__(self, name: str) -> Any:
        found = self.__dict__.get(_OF_LAYERS, {}).get(name)
        if found is None:
            return super().__getattr__(name)
        layer, transposed = found
        weight = layer.weight
        return announce(weight.t() if transposed else weight, layer, as_weight=not transposed)


class ProductsByLayers(ParametersOfLayers, Decomposed):
    """Mixin whose forward calls layers instead of multiplying by the module's matrices."""

    layers_first = False
    # Code of its own may go by the name of its class.
    name_prefix = ""

    @classmethod
    def parts_named(cls, module: nn.Module, layers: Iterable[str]) -> dict[str, Part]:
        """The parts of the layers with these names, as far as the module has such matrices."""
        wanted = set(layers)
        if isinstance(module, Decomposed) or not any(name.endswith((_LINEAR, _MATMUL)) for name in wanted):
            return {}
        parts: dict[str, list[Part]] = {}
        for path, parameter in module.named_parameters(remove_duplicate=False):
            for outputs_first in (True, False):
                name = layer_name(path, outputs_first)
                if name in wanted and parameter.dim() == 2:
                    parts.setdefault(name, []).append(Part(path, transposed=not outputs_first))
        # Names such as ``a.b`` and ``a_b`` would have one layer.
        return {name: of_name[0] for name, of_name in parts.items() if len(of_name) == 1}

    @classmethod
    def made_for(cls, base: type[nn.Module]) -> dict[str, Any]:
        @functools.wraps(base.forward)
        def forward(self: ProductsByLayers, *args: Any, **kwargs: Any) -> Any:
            if "owned_layers" not in self.__dict__:
                # Built from the class of a decomposed module.
                return base.forward(self, *args, **kwargs)
            self.claim_layers()
            # A parametrization computes a new tensor each time that the forward reads the Parameter.
            with parametrize.cached() if self._has_computed() else nullcontext():
                calling = _Calling(self)
                # Not in __enter__: torch 2.8 compiles only modes that use TorchFunctionMode's __enter__ and __exit__.
                _running.modes.append(calling)
                try:
                    with calling:
                        return base.forward(self, *args, **kwargs)
                finally:
                    _running.modes.pop()

        return {"forward": forward}

    def _has_computed(self) -> bool:
        """Whether a matrix is computed, as by a parametrization."""
        layers = (self._modules[name] for name in self.owned_layers)
        return any(isinstance(layer, ParameterLayer) and layer.parameter is None for layer in layers)

    def leave_parameters(self, parts: Mapping[str, Part]) -> None:
        """Make the weights of the layers what is read as the module's Parameters."""
        for name, part in parts.items():
            holder, key = holder_of(self, part.weight)
            layer = self._modules[name]
            if reads_itself(self, holder):
                # It shares the layer's weight: see cpq_lightning.attach.tied.
                holder._parameters[key] = layer.weight  # type: ignore[union-attr, assignment]
                self.__dict__.setdefault(_SHARED, {})[part.weight] = layer
                continue
            del holder._parameters[key]
            if not isinstance(holder, ParametersOfLayers):
                switch_class(holder, ParametersOfLayers)
            holder.__dict__.setdefault(_OF_LAYERS, {})[key] = (layer, part.transposed)


class _Running(threading.local):
    """The running forwards of a thread, innermost last."""

    def __init__(self) -> None:
        self.modes: list[_Calling] = []


_running = _Running()


def announce(tensor: Tensor, layer: nn.Module | None, as_weight: bool = True) -> Tensor:
    """Tell the running forwards that a tensor has the values of a layer's weight, or of its transposed."""
    for mode in _running.modes:
        mode.recognize(tensor, layer, as_weight)
    return tensor


class _Read:
    """How a tensor with the values of a matrix is read.

    Args:
        layer: The layer.
        as_weight: Whether the tensor has the layout of the layer's weight, and not of its transposed.
        quantized: Whether operations other than products read it quantized.
    """

    def __init__(self, layer: Any, as_weight: bool, quantized: bool) -> None:
        self.layer, self.as_weight, self.quantized = layer, as_weight, quantized

    def __call__(self, tensor: Tensor) -> Tensor:
        quantizer = getattr(self.layer, "weight_quantizer", None)
        if quantizer is None or not self.quantized:
            return tensor
        return quantizer(tensor) if self.as_weight else quantizer(tensor.t()).t()

    @property
    def active(self) -> bool:
        """Whether the layer quantizes anything."""
        quantizers = (self.layer._modules.get(name) for name in ("weight_quantizer", "input_quantizer"))
        return any(quantizer is not None and quantizer.active for quantizer in quantizers)


class _Calling(ReadQuantized):
    """Function mode in which products with the matrices of a module call its layers.

    Where a matrix is multiplied in another way, or is read by another operation, it is read quantized. Where gradients
    are disabled within the forward it is not, because such code may write the result back, as of a normalization.
    """

    def __init__(self, module: ProductsByLayers) -> None:
        self.layers = [module._modules[name] for name in module.owned_layers]
        known: list[tuple[Tensor, Any]] = []
        for layer in self.layers:
            if isinstance(layer, ParameterLayer):
                holder, key = holder_of(module, layer.part.weight)
                read = _Read(layer, not layer.part.transposed, not reads_itself(module, holder))
                known.append((getattr(holder, key), read))
        for path, layer in module.__dict__.get(_SHARED, {}).items():
            holder, key = holder_of(module, path)
            if key in holder._parameters:
                known.append((getattr(holder, key), _Read(layer, as_weight=True, quantized=False)))
        super().__init__(known)
        # The matrices themselves come first; what follows are views and copies of them.
        self.stored = len(known)
        self.transposed: dict[tuple[int, bool], Tensor] = {}

    def recognize(self, tensor: Tensor, layer: nn.Module | None, as_weight: bool) -> None:
        """See :func:`announce`."""
        if any(layer is own for own in self.layers):
            self.weights.append((tensor, _Read(layer, as_weight, False)))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._reads((args, kwargs)):
            return func(*args, **kwargs)
        index = self._index(args[0]) if args else -1
        if index >= 0:
            transposes = follow_matrix(func, args, kwargs)
            if transposes is not None:
                return self._follow(index, transposes, func, args, kwargs)
            if index >= self.stored and writes(func):
                # A copy that is written to no longer has the values of the matrix.
                del self.weights[index]
                self.transposed.clear()
                return self.__torch_function__(func, types, args, kwargs)
        call = as_layer_call(func, args, kwargs, self._is_matrix)
        read: Any = None if call is None else self.weights[self._index(call.matrix)][1]
        if call is None or call.outputs_first != read.as_weight:
            if self.started_with_gradients and not torch.is_grad_enabled():
                return func(*args, **kwargs)
            return super().__torch_function__(func, types, args, kwargs)
        if read.active:
            self.refuse_reentrant_checkpoint()
        return call.finish(_called(read.layer, call.input, call.matrix))

    def _follow(self, index: int, transposes: bool, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function whose result has the values of a matrix."""
        # One view serves all steps of a loop.
        key = (index, torch.is_grad_enabled())
        if transposes and index < self.stored and key in self.transposed:
            return self.transposed[key]
        out = func(*args, **kwargs)
        read: Any = self.weights[index][1]
        if isinstance(out, Tensor) and out.is_floating_point() and self._index(out) < 0:
            self.weights.append((out, _Read(read.layer, read.as_weight != transposes, read.quantized)))
            if transposes and index < self.stored:
                self.transposed[key] = out
        return out

    def _index(self, value: Any) -> int:
        return next((index for index, (tensor, _) in enumerate(self.weights) if tensor is value), -1)

    def _is_matrix(self, value: Any) -> bool:
        return self._index(value) >= 0


def _called(layer: Any, x: Tensor, matrix: Tensor) -> Tensor:
    """The output of a layer for a product with its matrix, which may have been converted to another type."""
    stored = layer.weight.dtype
    return layer(x) if matrix.dtype is stored else layer(x.to(stored)).to(matrix.dtype)
