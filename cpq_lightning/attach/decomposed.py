"""Decomposed modules: they multiply by Parameters of their own, such as ``nn.MultiheadAttention``, and compute the same
through layers here, which are quantized like any other layer.

A decomposed module keeps its Parameters, under the same names in its ``state_dict``. For each product it gets a
:class:`ParameterLayer`, a linear layer whose weight is the Parameter, or some of its rows.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cpq_lightning.attach.class_switch import Switched, switch_class, switch_class_back
from cpq_lightning.nn.sharding import full_tensor

# Attribute of a layer inside of a decomposed module: that module.
OWNER = "_cpq_owner"

Rows = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """The weight and the bias of a layer, as parts of its owner's Parameters.

    Attributes:
        weight: Name of the Parameter that has the weight; dotted if it belongs to a module inside of the owner.
        bias: Name of the Parameter that has the bias, if any.
        rows: The rows of the weight, from and to; ``None`` means all.
        bias_rows: The elements of the bias, likewise.
        transposed: Whether the Parameter has the shape (inputs, outputs).
    """

    weight: str
    bias: str | None = None
    rows: Rows | None = None
    bias_rows: Rows | None = None
    transposed: bool = False

    def weight_of(self, owner: nn.Module) -> Tensor:
        """The weight, shape (outputs, inputs): a view of the owner's Parameter."""
        holder, name = holder_of(owner, self.weight)
        return self.weight_in(getattr(holder, name))

    def weight_in(self, parameter: Tensor) -> Tensor:
        """The weight in a tensor like the Parameter, as a view."""
        weight = _rows(parameter, self.rows)
        if weight.dim() > 2:
            # A stack of matrices is one matrix with all their rows. torch does not flatten uneven shards.
            return full_tensor(weight).flatten(0, -2)
        return weight.t() if self.transposed else weight

    def bias_of(self, owner: nn.Module) -> Tensor | None:
        """The bias, shape (outputs,)."""
        bias = None if self.bias is None else getattr(owner, self.bias)
        return None if bias is None else _rows(bias, self.bias_rows)


def holder_of(owner: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has a Parameter, and the Parameter's name there."""
    path, _, key = name.rpartition(".")
    return owner.get_submodule(path), key


def reads_itself(owner: nn.Module, holder: nn.Module) -> bool:
    """Whether a module inside of an owner, such as an embedding, has a forward that may read its Parameters."""
    return holder is not owner and type(holder).forward is not nn.Module.forward


def _rows(tensor: Tensor, rows: Rows | None) -> Tensor:
    return tensor if rows is None else tensor[rows[0] : rows[1]]


class ParameterLayer(nn.Linear):
    """A linear layer whose weight and bias are (parts of) Parameters of its owner.

    The layer itself has no Parameters, so the model's ``state_dict`` and optimizers do not change.

    Args:
        owner: The decomposed module.
        part: Where the weight and the bias lie.
    """

    def __init__(self, owner: nn.Module, part: Part) -> None:
        nn.Module.__init__(self)
        # Not by setattr, which would register the owner as a submodule of its own layer.
        self.__dict__[OWNER] = owner
        self.part = part
        self.out_features, self.in_features = self.weight.shape
        self.training = owner.training

    @property
    def owner(self) -> nn.Module:
        """The decomposed module."""
        return self.__dict__[OWNER]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Shape (outputs, inputs), a view of the owner's Parameter."""
        return self.part.weight_of(self.owner)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """Shape (outputs,), a view of the owner's Parameter."""
        return self.part.bias_of(self.owner)

    @property
    def parameter(self) -> nn.Parameter | None:
        """The owner's Parameter that has the weight; ``None`` if a parametrization or a pruning mask computes it."""
        holder, name = holder_of(self.owner, self.part.weight)
        return holder._parameters.get(name)


def whole_parameter(layer: nn.Module) -> nn.Parameter | None:
    """The Parameter that is a layer's weight; ``None`` if the weight is computed, or a part of one, or its transposed.

    Other modules may share it.
    """
    if not isinstance(layer, ParameterLayer):
        return layer._parameters.get("weight")
    parameter = layer.parameter
    whole = parameter is not None and layer.part.rows is None and not layer.part.transposed and parameter.dim() == 2
    return parameter if whole else None


def store_weight(layer: nn.Module, weight: nn.Parameter) -> None:
    """Make a Parameter of shape (outputs, inputs) the weight of a linear layer, or of any other layer."""
    if not isinstance(layer, ParameterLayer):
        layer.weight = weight
        return
    holder, name = holder_of(layer.owner, layer.part.weight)
    holder._parameters[name] = nn.Parameter(weight.detach().t().contiguous()) if layer.part.transposed else weight


class Decomposed(Switched):
    """Base of the mixins that compute a module's forward through its layers.

    Attributes:
        owned_layers: Names of the module's :class:`ParameterLayer` children.
    """

    owned_layers: tuple[str, ...]
    # Classes whose forward the mixin computes; a mixin without any has a forward for each class that it is made for.
    stock: ClassVar[tuple[type[nn.Module], ...]] = ()
    # Names of further layers of the module, which its own forward does not call.
    other_layers: ClassVar[tuple[str, ...]] = ()
    # Whether the layers come before the module's other modules, in the forward and thus in registration order.
    layers_first: ClassVar[bool] = True

    @classmethod
    def parts_of(cls, module: nn.Module) -> dict[str, Part]:
        """The layers that compute the products of an instance of a stock class, by name."""
        raise NotImplementedError

    @classmethod
    def forward_for(cls, stock: type[nn.Module]) -> Callable[..., Any]:
        """The function that takes the place of a stock class's forward."""
        raise NotImplementedError

    @classmethod
    def is_stock(cls, candidate: type) -> bool:
        """Whether the mixin computes the forward of this class."""
        return candidate in cls.stock

    @classmethod
    def stock_of(cls, kind: type[nn.Module]) -> type[nn.Module] | None:
        """The stock class whose forward computes the products of a class; ``None`` if there is none.

        A subclass may have a forward of its own, if that calls ``super().forward``.
        """
        for base in kind.__mro__:
            if cls.is_stock(base):
                return base
            if "forward" in vars(base) and not _calls_super(vars(base)["forward"]):
                return None
        return None

    @classmethod
    def bases_for(cls, base: type[nn.Module]) -> tuple[type[nn.Module], ...]:
        stock = cls.stock_of(base)
        if stock is None:
            return super().bases_for(base)
        # Behind subclasses of the stock class, whose super().forward then finds the mixin's.
        computed = _computed_class(cls, stock)
        return (computed,) if base is stock else (base, computed)

    @classmethod
    def beside(cls, layer: str) -> tuple[str, ...]:
        """Layers with the same input, or the same output, as a layer: they are first or last together."""
        return ()

    def leave_parameters(self, parts: Mapping[str, Part]) -> None:
        """Remove the Parameters of the parts, which have become weights and biases of the layers."""
        for key in {key for part in parts.values() for key in (part.weight, part.bias) if key is not None}:
            setattr(self, key, None)

    def claim_layers(self) -> None:
        """Give a shallow copy of a module, which shares its layers with the original, layers of its own."""
        layers = {name: self._modules[name] for name in self.owned_layers}
        shared = {n: m for n, m in layers.items() if isinstance(m, ParameterLayer) and m.owner is not self}
        if shared:
            # The dict is shared too.
            self.__dict__["_modules"] = dict(self._modules)
            for name, layer in shared.items():
                own = self._modules[name] = copy.copy(layer)
                own.__dict__[OWNER] = self


def _calls_super(forward: Any) -> bool:
    """Whether a forward calls the one of its base class by ``super()``, as far as its code shows."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code is not None and {"super", "forward"} <= set(code.co_names)


@functools.cache
def _computed_class(mixin: type[Decomposed], stock: type[nn.Module]) -> type[nn.Module]:
    forward = functools.wraps(stock.forward)(mixin.forward_for(stock))
    return type(f"{stock.__name__}ByLayers", (mixin, stock), {"forward": forward})


def owner_of(layer: nn.Module) -> Decomposed | None:
    """The decomposed module that a layer belongs to, if it belongs to one."""
    return layer.__dict__.get(OWNER)


def is_plain(module: nn.Module, parts: Mapping[str, Part]) -> bool:
    """Whether a module's Parameters are stored in it and not computed, and no attribute has the name of a layer."""
    names = {name for part in parts.values() for name in (part.weight, part.bias) if name is not None}
    stored = {name: holder_of(module, name) for name in names}
    computed = any(key not in holder._parameters for holder, key in stored.values())
    holders = [stored[part.weight] for part in parts.values() if not computed]
    matrices = [holder._parameters[key] for holder, key in holders]
    usable = all(p is not None and p.is_floating_point() and not nn.parameter.is_lazy(p) for p in matrices)
    return not computed and usable and not any(hasattr(module, name) for name in parts)


def decompose_module(module: nn.Module, mixin: type[Decomposed], parts: Mapping[str, Part]) -> Decomposed:
    """Make a module compute through layers, in place."""
    decomposed = switch_class(module, mixin)
    decomposed.owned_layers = tuple(parts)
    others = dict(decomposed._modules)
    if mixin.layers_first:
        decomposed._modules.clear()
    for name, part in parts.items():
        decomposed.add_module(name, ParameterLayer(decomposed, part))
    decomposed._modules.update(others)
    for name in mixin.other_layers:
        decomposed.get_submodule(name).__dict__[OWNER] = decomposed
    return decomposed


def recompose_module(module: Decomposed) -> None:
    """Undo :func:`decompose_module`."""
    for name in module.__dict__.pop("owned_layers"):
        module._modules.pop(name, None)
    for name in type(module).mixin.other_layers:  # type: ignore[attr-defined]
        module.get_submodule(name).__dict__.pop(OWNER, None)
    switch_class_back(module)


@torch.no_grad()
def own_weights(module: Decomposed) -> None:
    """Replace the layers of a decomposed module by linear layers with Parameters of their own, and remove the module's.

    The module then computes the same, and its state has the names of the layers.
    """
    parts: dict[str, Part] = {}
    for name in module.owned_layers:
        layer = module._modules[name]
        if not isinstance(layer, ParameterLayer):
            continue
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta").train(layer.training)
        linear.weight = nn.Parameter(layer.weight.clone(memory_format=torch.contiguous_format))
        bias = layer.bias
        if bias is not None:
            linear.bias = nn.Parameter(bias.clone())
        parts[name] = layer.part
        module._modules[name] = linear
    module.leave_parameters(parts)


def shapes_with_own_weights(name: str, parts: Mapping[str, Part], module: nn.Module) -> dict[str, Any]:
    """What :func:`own_weights` makes of a module's state: the names of its layers' tensors with their shapes.

    Args:
        name: The module's name.
        parts: Its parts.
        module: The module, decomposed or not.
    """
    prefix = f"{name}." if name else ""
    shapes: dict[str, Any] = {}
    for layer, part in parts.items():
        shapes[f"{prefix}{layer}.weight"] = tuple(part.weight_of(module).shape)
        bias = part.bias_of(module)
        if bias is not None:
            shapes[f"{prefix}{layer}.bias"] = tuple(bias.shape)
    return shapes
