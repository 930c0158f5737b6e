"""The audit of one forward: which quantizers were never called, which matrix products stayed unquantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from cpq_lightning.attach.layers import QuantizedLayer
from cpq_lightning.attach.operations import (
    FUSED,
    WITH_WEIGHT,
    WITHOUT_WEIGHT,
    keeps_values,
    multiply_accumulates,
    product_operands,
)
from cpq_lightning.attach.products import QuantizedProducts
from cpq_lightning.attach.select import attached_config, matches
from cpq_lightning.attach.timm_layers import holds_weight
from cpq_lightning.nn import Quantizer

if TYPE_CHECKING:
    from typing_extensions import Self


_UNAUDITED: ContextVar[bool] = ContextVar("unaudited", default=False)


@contextmanager
def unaudited() -> Iterator[None]:
    """Run what is no part of the model that an audit watches, such as a teacher."""
    token = _UNAUDITED.set(True)
    try:
        yield
    finally:
        _UNAUDITED.reset(token)


@dataclass
class AuditReport:
    """What one forward showed.

    Attributes:
        never_called: Names of quantizers that no call reached.
        unquantized: ``(module, operation, operand)`` of each product with a weight (a Parameter that is multiplied
            without a layer, or by a recurrent one, too) of which the weight, the input or both came in full precision,
            layers left out by the config aside.
        activation_products: ``(module, operation)`` of each product of two activations, such as attention's, of which
            one or both came in full precision.
        overlooked: Those of ``activation_products`` that ``attention=True`` should have found: their modules multiplied
            nothing in the forward that the model was attached with.
        order: Names of the quantized layers in the order in which they were first called.
        macs: Multiply-accumulates in one sample, by name of the weight quantizer, or of a product's left one; a layer
            that is called twice counts once.
        numel: Elements in one sample, by name of the activation quantizer that they passed.
    """

    never_called: list[str] = field(default_factory=list)
    unquantized: list[tuple[str, str, str]] = field(default_factory=list)
    activation_products: list[tuple[str, str]] = field(default_factory=list)
    overlooked: list[tuple[str, str]] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    macs: dict[str, int] = field(default_factory=dict)
    numel: dict[str, int] = field(default_factory=dict)

    def messages(self) -> list[str]:
        """One sentence a finding."""
        found = []
        if self.never_called:
            found.append(
                f"{len(self.never_called)} quantizers were never called in the first forward: "
                f"{_some(self.never_called)}. Their layers run in full precision or not "
                "at all; leave such layers out with ignore."
            )
        if self.unquantized:
            lines = [f"{module or 'the model itself'} ({op}: {what})" for module, op, what in self.unquantized]
            found.append(
                f"{len(lines)} matrix products with a weight stayed unquantized in the first forward: {_some(lines)}."
            )
        if self.overlooked:
            found.append(
                f"attention=True: {len(self.overlooked)} products of two activations stayed unquantized, of modules "
                "that multiplied nothing in the forward that the model was attached with: "
                f"{_some(_where_and_what(self.overlooked))}. Give attach(..., "
                "example_inputs=...), or an example_input_array, that lead there too."
            )
        if self.activation_products:
            lines = _where_and_what(self.activation_products)
            found.append(f"{len(lines)} products of two activations are not quantized: {_some(lines)}.")
        return found


def _where_and_what(products: list[tuple[str, str]]) -> list[str]:
    return [f"{module or 'the model itself'} ({op})" for module, op in products]


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class Audit(TorchFunctionMode):
    """Watch one forward of an attached model; used as a context, it leaves its :attr:`report`.

    It sees functions as Python calls them, before casts by autocast. Which of their tensors are quantized it knows by
    following the quantizers' outputs through operations that only move values. A quantized weight that is standardized
    (as timm's ``StdConv2d`` does) stays quantized: its levels are moved by one affine map a channel. So does a mixture
    of quantized weights (``CondConv2d``): the product with it is the mixture of the products with each.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.report = AuditReport()
        self._names = {module: name for name, module in model.named_modules()}
        self._called: set[nn.Module] = set()
        self._left_out = _left_out(model)
        config = attached_config(model)
        self._all_products = config is not None and config.attention
        self._stack: list[nn.Module] = []
        # Which quantizer a tensor came from.
        self._quantized = WeakTensorKeyDictionary()
        # Parameters, and what moves their values.
        self._parameters = WeakTensorKeyDictionary()
        self._batch = 0
        self._counted: set[tuple[str, Quantizer]] = set()
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        # Hooks of all modules rather than of each: they can be removed while a forward is failing.
        self._handles = [
            register_module_forward_pre_hook(self._push),
            register_module_forward_hook(self._pop, always_call=True),
        ]
        self._parameters.update((parameter, True) for parameter in self.model.parameters())
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for handle in self._handles:
            handle.remove()
        self.report.never_called = [
            name for module, name in self._names.items() if isinstance(module, Quantizer) and module not in self._called
        ]

    def _push(self, module: nn.Module, args: Any) -> None:
        if module not in self._names:
            return
        self._stack.append(module)
        if isinstance(module, QuantizedLayer) and self._names[module] not in self.report.order:
            self.report.order.append(self._names[module])

    def _pop(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack and self._stack[-1] is module:
            self._stack.pop()
        if isinstance(module, Quantizer) and output is not None:
            self._called.add(module)
            self._quantized[output] = module
            if module.kind == "activation":
                self.report.numel[self._names[module]] = output.numel() // self._samples(output)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if _UNAUDITED.get():
            return out
        if func in WITH_WEIGHT:
            self._product(func, args, kwargs, out)
        elif func in WITHOUT_WEIGHT:
            self._product_of_two(func, args, kwargs, out)
        elif func in FUSED:
            self.report.unquantized.append((self._where(), func.__name__, "input and weight"))
        elif args and isinstance(args[0], Tensor) and self._keeps(func, args[0]):
            for tensor in out if isinstance(out, tuple | list) else (out,):
                for known in (self._quantized, self._parameters):
                    if isinstance(tensor, Tensor) and args[0] in known:
                        known[tensor] = known[args[0]]
        return out

    def _keeps(self, func: Callable[..., Any], source: Tensor) -> bool:
        standardizes = func is F.batch_norm and source in self._quantized and self._quantized[source].kind == "weight"
        return keeps_values(func) or standardizes

    def _product_of_two(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        """A product that no layer stands for: of two activations, or of an activation and a Parameter."""
        where, name = self._where(), func.__name__.strip("_")
        operands = product_operands(func, args, kwargs)
        kinds = [self._kind(operand) for operand in operands]
        if len(kinds) < 2:
            return
        layer = self._stack[-1] if self._stack else None
        mixed = [quantizer for quantizer, kind in kinds if quantizer is not None and kind == "weight"]
        if mixed and isinstance(layer, QuantizedLayer):
            self._quantized[out] = mixed[0]
        missing = {kind for quantizer, kind in kinds if quantizer is None}
        left = kinds[0][0]
        if not missing and left is not None and left.kind == "activation":
            self._note_macs(left, multiply_accumulates(func, args, operands, out) // self._samples(operands[0]))
        if missing and any(kind == "weight" for _, kind in kinds):
            self.report.unquantized.append((where, name, " and ".join(sorted(missing))))
        elif missing:
            self.report.activation_products.append((where, name))
            if self._all_products and not isinstance(layer, QuantizedProducts):
                self.report.overlooked.append((where, name))

    def _kind(self, value: Tensor) -> tuple[Quantizer | None, str]:
        """What quantized an operand of a product, and whether it is a weight or an input."""
        quantizer = self._quantized.get(value)
        weight = value in self._parameters or (quantizer is not None and quantizer.kind == "weight")
        return quantizer, "weight" if weight else "input"

    def _product(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        operands = [args[i] if len(args) > i else kwargs.get(name) for i, name in enumerate(("input", "weight"))]
        layer = self._stack[-1] if self._stack else None
        self._count(func, operands[0], operands[1], out, layer)
        expected = ["input", "weight"]
        if isinstance(layer, QuantizedLayer):
            expected = ["weight"] if layer.input_quantizer is None else expected
        elif layer in self._left_out or (layer is not None and next(layer.parameters(), None) is None):
            # What has no parameter, such as a blur within an augmentation, has no weight to quantize.
            return
        missing = [
            name
            for name, operand in zip(("input", "weight"), operands, strict=True)
            if name in expected and not self._is_quantized(operand)
        ]
        if missing:
            self.report.unquantized.append((self._where(), func.__name__, " and ".join(missing)))

    def _count(self, func: Any, input: Any, weight: Any, out: Tensor, layer: nn.Module | None) -> None:
        """Multiply-accumulates of a product with a quantized weight."""
        if not isinstance(input, Tensor) or not isinstance(weight, Tensor):
            return
        quantizer = self._quantized.get(weight)
        if quantizer is None and isinstance(layer, QuantizedLayer):
            quantizer = layer.weight_quantizer
        if quantizer is None or quantizer.kind != "weight":
            return
        places = (input if "transpose" in func.__name__ else out).numel()
        self._note_macs(quantizer, places * (weight.numel() // weight.shape[0]) // self._samples(input))

    def _note_macs(self, quantizer: Quantizer, macs: int) -> None:
        """Once a module, however often it is called."""
        if (self._where(), quantizer) not in self._counted:
            self._counted.add((self._where(), quantizer))
            name = self._names[quantizer]
            self.report.macs[name] = self.report.macs.get(name, 0) + macs

    def _samples(self, x: Tensor) -> int:
        """Samples in the batch, as what is met first has them: further in they may be folded with windows or tokens."""
        self._batch = self._batch or (max(1, x.shape[0]) if x.dim() > 1 else 1)
        return self._batch

    def _is_quantized(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value in self._quantized

    def _where(self) -> str:
        return self._names[self._stack[-1]] if self._stack else ""


def _left_out(model: nn.Module) -> set[nn.Module]:
    """Layers that the config leaves in full precision; where only a part was attached, all outside of it."""
    config = attached_config(model)
    plain = {n: m for n, m in model.named_modules() if holds_weight(m)}
    if config is None:
        return set(plain.values())
    return {m for n, m in plain.items() if any(matches(n, m, pattern) for pattern in config.ignore)}
