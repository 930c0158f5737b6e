"""Products of two activations, such as attention's q·kᵀ and attention·v: a module whose own products are quantized."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_unflatten

from cpq_lightning.attach.class_switch import Switched, switch_class, switch_class_back
from cpq_lightning.attach.torch_ops import WITHOUT_WEIGHT, flat_operands
from cpq_lightning.attach.wrapping import unwrapped
from cpq_lightning.functional.attention import attention
from cpq_lightning.nn.quantizer import Quantizer

# The buffer that holds a module's plan: what attaches its quantizers again knows it from there.
STATE = "product_state"


class Operand(nn.Module):
    """One side of a product: what quantizes it, ``input_quantizer``, or ``input_grid`` in an artefact."""

    def forward(self, input: Tensor) -> Tensor:
        for part in self.children():
            input = part(input)
        return input


class QuantizedProducts(Switched):
    """Mixed in before a module's own class by :func:`quantize_products`.

    Attributes:
        product_plan: For each matrix product that its forward makes, in order, whether it is quantized;
            ``scaled_dot_product_attention`` makes two.
        product_counts: How many products a forward may make in all; one that makes others goes another way than those
            did that the plan is of, and fails.
        product_operands: An :class:`Operand` for both sides of each of these, ``0_left``, ``0_right``, ``1_left``, …
    """

    product_plan: tuple[bool, ...]
    product_counts: frozenset[int]
    product_operands: nn.ModuleDict

    @classmethod
    def made_for(cls, base: type[nn.Module]) -> dict[str, Any]:
        @functools.wraps(base.forward)
        def forward(self: QuantizedProducts, *args: Any, **kwargs: Any) -> Any:
            # Exporters, and Lightning, read the names of a forward's arguments.
            return QuantizedProducts.forward(self, *args, **kwargs)

        return {"forward": forward}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        products = _Quantizing(self.product_operands if any(self.product_plan) else {})
        # Here, not in __enter__: torch 2.8 compiles modes that enter and exit as TorchFunctionMode does, and no others.
        _running.forwards.append(products)
        try:
            with products:
                output = super().forward(*args, **kwargs)
        finally:
            _running.forwards.pop()
        if products.made not in self.product_counts:
            raise RuntimeError(
                f"attention=True: a forward of {self.base_class.__name__} multiplies {products.made} times, and "
                f"{sorted(self.product_counts)} times when its products were found. Which is which is not known then: "
                "leave the module out with ignore, or let its forward go the same way in training and in evaluation."
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
    """Let a module quantize what its forward multiplies, in place.

    Args:
        module: The module whose own forward makes the products.
        plan: See :class:`QuantizedProducts`.
        counts: Likewise.
        parts: What quantizes each operand, by :func:`operand_names`; ``None`` leaves one as it is.
        part_name: Its name in the :class:`Operand`.
    """
    module = unwrapped(module)
    if any(plan) and isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise ValueError(
            f"attention=True: {type(module).__name__} multiplies activations and is a container, which would take what "
            "quantizes them for one of its own: leave it out with ignore, or multiply in a module of its own."
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

    As float32, length first: an average of two models, which mixes all tensors, leaves whole numbers within rounding.
    """
    plan, counts = module.product_plan, sorted(module.product_counts)
    device = next((t.device for t in itertools.chain(module.parameters(), module.buffers())), None)
    values = torch.tensor([len(plan), *map(float, plan), *counts], dtype=torch.float32, device=device)
    module.register_buffer(STATE, values)


def plan_of(state: Tensor) -> tuple[list[bool], list[int]]:
    """The plan, and the counts of products, that a buffer of :func:`remember_plan` holds."""
    length, *values = [round(value) for value in state.tolist()]
    return [bool(value) for value in values[:length]], values[length:]


def leave_products(module: QuantizedProducts) -> None:
    """Take back :func:`quantize_products`."""
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
    """What quantizes the sides of products in an attached model, with the names of the operands."""
    for name, module in modules_with_products(model):
        for operand in operand_names(module.product_plan):
            yield operand_path(name, operand), module.product_operands[operand].input_quantizer  # type: ignore[misc]


class _Running(threading.local):
    """The forwards under way in a thread, the innermost one last: a product belongs to it alone."""

    def __init__(self) -> None:
        self.forwards: list[_Quantizing] = []


_running = _Running()


class _Quantizing(TorchFunctionMode):
    """One forward of a module; the products that it makes get their operands quantized, of those that have some."""

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
        if fused:
            return attention(*args, **kwargs, operands=sides)
        leaves, spec, places = flat_operands(func, args, kwargs)
        if len(places) != len(sides):
            return func(*args, **kwargs)
        for place, side in zip(places, sides, strict=True):
            leaves[place] = side(leaves[place])
        quantized, named = tree_unflatten(leaves, spec)
        return func(*quantized, **named)
