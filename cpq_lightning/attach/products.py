"""Modules whose products of two activations are quantized, such as attention's q·kᵀ and attention·v."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from cpq_lightning.attach.class_switch import Switched, switch_class, switch_class_back
from cpq_lightning.attach.forward_mode import ForwardMode
from cpq_lightning.attach.torch_ops import WITHOUT_WEIGHT, flat_operands
from cpq_lightning.attach.wrapping import unwrapped
from cpq_lightning.functional.attention import attention
from cpq_lightning.nn.quantizer import Quantizer

# Name of the buffer with a module's plan, from which its quantizers are attached again.
STATE = "product_state"


class Operand(nn.Module):
    """One operand of a product: it applies ``input_quantizer``, or ``input_grid`` in an integer model."""

    def forward(self, input: Tensor) -> Tensor:
        for part in self.children():
            input = part(input)
        return input


class QuantizedProducts(Switched):
    """Mixin that :func:`quantize_products` puts before a module's class.

    Attributes:
        product_plan: For each matrix product in the module's forward, in order, whether it is quantized;
            ``scaled_dot_product_attention`` counts as two products.
        product_counts: The allowed numbers of products in a forward. A forward with another number fails, because it
            took another path than the forwards that the plan describes.
        product_operands: An :class:`Operand` for both operands of each quantized product, ``0_left``, ``0_right``,
            ``1_left``, …
    """

    product_plan: tuple[bool, ...]
    product_counts: frozenset[int]
    product_operands: nn.ModuleDict

    @classmethod
    def made_for(cls, base: type[nn.Module]) -> dict[str, Any]:
        @functools.wraps(base.forward)
        def forward(self: QuantizedProducts, *args: Any, **kwargs: Any) -> Any:
            # Exporters and Lightning read the names of the forward's arguments.
            return QuantizedProducts.forward(self, *args, **kwargs)

        return {"forward": forward}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        products = _Quantizing(self.product_operands if any(self.product_plan) else {})
        # Not in __enter__: torch 2.8 compiles only modes that use TorchFunctionMode's __enter__ and __exit__.
        _running.forwards.append(products)
        try:
            with products:
                output = super().forward(*args, **kwargs)
        finally:
            _running.forwards.pop()
        if products.made not in self.product_counts:
            raise RuntimeError(
                f"attention=True: a forward of {self.base_class.__name__} multiplies {products.made} times, and "
                f"{sorted(self.product_counts)} times when its products were found, so they cannot be matched: leave "
                "the module out with ignore, or make its forward multiply equally often in training and in evaluation."
            )
        return output


def operand_names(plan: Sequence[bool]) -> list[str]:
    """Keys of :attr:`QuantizedProducts.product_operands` for a plan."""
    return [f"{product}_{side}" for product, counts in enumerate(plan) if counts for side in ("left", "right")]


def operand_path(module: str, operand: str) -> str:
    """Dotted name of an operand of a module's products."""
    return f"{module}.product_operands.{operand}" if module else f"product_operands.{operand}"


def quantize_products(
    module: nn.Module,
    plan: Sequence[bool],
    counts: Iterable[int],
    parts: Mapping[str, nn.Module | None],
    part_name: str,
) -> QuantizedProducts:
    """Make a module quantize the operands of the products in its forward, in place.

    Args:
        module: The module whose forward makes the products.
        plan: See :class:`QuantizedProducts`.
        counts: See :class:`QuantizedProducts`.
        parts: The quantizer of each operand, by :func:`operand_names`; ``None`` leaves an operand unchanged.
        part_name: The name of the quantizer in its :class:`Operand`.
    """
    module = unwrapped(module)
    if any(plan) and isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise ValueError(
            f"attention=True: {type(module).__name__} multiplies activations and is a container, which would use the "
            "quantizers as its items: leave it out with ignore, or multiply in a separate module."
        )
    operands = nn.ModuleDict()
    for name in operand_names(plan):
        part = parts[name]
        operands[name] = Operand()
        if part is not None:
            operands[name].add_module(part_name, part)
    operands.train(module.training)
    switched = switch_class(module, QuantizedProducts)
    switched.product_plan = tuple(map(bool, plan))
    switched.product_counts = frozenset(counts)
    if operands:
        switched.product_operands = operands
    return switched


def remember_plan(module: QuantizedProducts) -> None:
    """Keep a module's plan in its ``state_dict``.

    The buffer is float32, and begins with the plan's length: averaging two models averages all tensors, and then leaves
    these whole numbers exact up to rounding.
    """
    plan, counts = module.product_plan, sorted(module.product_counts)
    device = next((t.device for t in itertools.chain(module.parameters(), module.buffers())), None)
    values = torch.tensor([len(plan), *map(float, plan), *counts], dtype=torch.float32, device=device)
    module.register_buffer(STATE, values)


def plan_of(state: Tensor) -> tuple[list[bool], list[int]]:
    """The plan, and the allowed numbers of products, from a buffer of :func:`remember_plan`."""
    length, *values = [round(value) for value in state.tolist()]
    return [bool(value) for value in values[:length]], values[length:]


def leave_products(module: QuantizedProducts) -> None:
    """Undo :func:`quantize_products`."""
    module._buffers.pop(STATE, None)
    for name in ("product_plan", "product_counts"):
        module.__dict__.pop(name, None)
    module._modules.pop("product_operands", None)
    switch_class_back(module)


def modules_with_products(model: nn.Module) -> Iterator[tuple[str, QuantizedProducts]]:
    """The modules of a model whose products are quantized, with their names, in registration order."""
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, QuantizedProducts):
            yield name, module


def quantized_operands(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """The quantizers of product operands in an attached model, with the names of the operands."""
    for name, module in modules_with_products(model):
        for operand in operand_names(module.product_plan):
            yield operand_path(name, operand), module.product_operands[operand].input_quantizer  # type: ignore[misc]


class _Running(threading.local):
    """The running forwards of a thread, innermost last; a product belongs to the innermost forward only."""

    def __init__(self) -> None:
        self.forwards: list[_Quantizing] = []


_running = _Running()


class _Quantizing(ForwardMode):
    """Function mode around one forward of a module, which quantizes the operands of its planned products."""

    def __init__(self, operands: nn.ModuleDict | dict[str, nn.Module]) -> None:
        super().__init__()
        self.operands = operands
        self.made = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in WITHOUT_WEIGHT or _running.forwards[-1] is not self:
            return func(*args, **kwargs)
        fused = func is F.scaled_dot_product_attention
        first, self.made = self.made, self.made + 1 + fused
        names = [f"{product}_{side}" for product in range(first, self.made) for side in ("left", "right")]
        if not any(name in self.operands for name in names):
            return func(*args, **kwargs)
        sides = [self.operands[name] if name in self.operands else nn.Identity() for name in names]
        if any(isinstance(part, Quantizer) and part.active for side in sides for part in side.children()):
            self.refuse_reentrant_checkpoint()
        if fused:
            return attention(*args, **kwargs, operands=sides)
        leaves, spec, indices = flat_operands(func, args, kwargs)
        if len(indices) != len(sides):
            return func(*args, **kwargs)
        for index, side in zip(indices, sides, strict=True):
            leaves[index] = side(leaves[index])
        quantized, named_arguments = tree_unflatten(leaves, spec)
        return func(*quantized, **named_arguments)
